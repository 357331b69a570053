"""The kit can fail: every fault of the gallery is caught by the check that names it."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import Phase, settings

from tokenprune.plugins import registry
from tokenprune.plugins.offers import Offer
from tokenprune.testing import CHECKS, run_check

from .gallery import FAULTS, Fault


@pytest.fixture(autouse=True)
def _no_shrinking() -> Iterator[None]:
    """As many examples as authors of plugins get, and none made small: here nobody reads them."""
    before = settings.get_current_profile_name()
    settings.register_profile(
        "gallery",
        parent=settings.get_profile(before),
        max_examples=100,
        phases=[Phase.generate],
        database=None,
    )
    settings.load_profile("gallery")
    yield
    settings.load_profile(before)


@pytest.fixture
def _registered(fault: Fault) -> Iterator[None]:
    """The adapter of the fault, for as long as the test runs."""
    with registered(fault):
        yield


@contextmanager
def registered(fault: Fault) -> Iterator[None]:
    """The adapter of a fault among those that are installed."""
    if fault.plugin is None:
        yield
        return
    offers = registry().towers if fault.number.startswith("T") else registry().models
    offers.append(Offer(fault.plugin, "gallery"))
    yield
    offers.pop()


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize("fault", FAULTS, ids=[f"{fault.number}-{fault.name}" for fault in FAULTS])
def test_caught_by_the_check_that_names_it(fault):
    with pytest.raises(AssertionError) as caught:
        run_check(fault.number, fault.subject)
    assert fault.says in str(caught.value)


def test_every_promise_has_a_fault():
    assert {fault.number for fault in FAULTS} == set(CHECKS)
    # Of the later ones two, so that a check is not made for one fault.
    later = {"S": 8, "P": 16, "T": 4, "M": 8}
    counts = Counter(fault.number for fault in FAULTS)
    assert not [n for n in CHECKS if int(n[1:]) >= later[n[0]] and counts[n] < 2]


@pytest.mark.parametrize("number", CHECKS)
def test_a_check_made_toothless_is_noticed(number, monkeypatch):
    """Emptied, it lets its faults pass, so that the test above fails."""
    monkeypatch.setitem(CHECKS, number, replace(CHECKS[number], function=lambda case: None))
    for fault in (each for each in FAULTS if each.number == number):
        with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
            test_caught_by_the_check_that_names_it(fault)
