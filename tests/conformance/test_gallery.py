"""The kit can fail: every fault of the gallery is caught by the check that names it."""

from collections.abc import Iterator

import pytest
from hypothesis import Phase, settings

from tokenprune.plugins import registry
from tokenprune.plugins.offers import Offer
from tokenprune.testing import CHECKS, run_check

from .gallery import FAULTS, Fault


@pytest.fixture(autouse=True)
def _no_shrinking() -> Iterator[None]:
    """Making examples small takes most of the time, and here nobody reads them."""
    before = settings.get_current_profile_name()
    settings.register_profile(
        "gallery", parent=settings.get_profile(before), phases=[Phase.generate], database=None
    )
    settings.load_profile("gallery")
    yield
    settings.load_profile(before)


@pytest.fixture
def _registered(fault: Fault) -> Iterator[None]:
    """The adapter of the fault, for as long as the test runs."""
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
