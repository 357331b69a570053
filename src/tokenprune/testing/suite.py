"""Suite that `pytest --tokenprune-plugin PKG` collects: the contract, on what PKG registers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import entry_points

import pytest

from tokenprune.errors import PluginError, UnknownNameError
from tokenprune.plugins import CORE, registry
from tokenprune.strategy import Reducer, Scorer
from tokenprune.testing.cases import (
    Case,
    ModelCase,
    ReducerCase,
    ScorerCase,
    Subject,
    TowerCase,
    cases_of,
)
from tokenprune.testing.kit import parameters
from tokenprune.testing.promises import Check

GROUP = "tokenprune.testing"
"""Entry points of this group name functions that take nothing and yield cases."""

BUILT_IN = "tokenprune"
"""What is asked for to check the strategies that come along."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every test its part of what the distributions offer."""
    names: list[str] = metafunc.config.getoption("tokenprune_plugin")
    if "check" in metafunc.fixturenames:
        metafunc.parametrize(
            ("case", "check"), [each for name in names for each in parameters(subjects(name))]
        )
    elif "adapter" in metafunc.fixturenames:
        metafunc.parametrize(
            ("distribution", "adapter"), [(n, each) for n in names for each in _adapters(n)]
        )


def test_contract(case: Case, check: Check) -> None:
    """The check holds."""
    check(case)


def test_adapter_has_a_case(distribution: str, adapter: str) -> None:
    """An adapter that no case builds a model for would pass without having been tried."""
    covered = _covered(distribution)
    assert adapter in covered, (
        f"{distribution} offers an adapter for the {adapter}, but no case to try it on; yield a "
        f"TowerCase or ModelCase from an entry point of the group {GROUP!r}"
    )


def subjects(distribution: str) -> Iterator[Subject]:
    """Everything in `distribution` that can be checked.

    Raises:
        UnknownNameError: nothing is registered under that name.
        PluginError: its plugin is broken.
    """
    if _normal(distribution) == BUILT_IN:
        yield from (factory for origin, factory in _steps() if origin == CORE)
        return
    known = registry()
    broken = {_normal(name): error for name, error in known.broken.items()}
    if _normal(distribution) in broken:
        raise PluginError(
            f"the plugin of {distribution!r} is broken: {broken[_normal(distribution)]}"
        )
    origins = {offer.origin for _, offer in known}
    if _normal(distribution) not in map(_normal, origins):
        raise UnknownNameError(
            f"no plugin comes from {distribution!r}; plugins come from {', '.join(sorted(origins))}"
        )
    cases = list(_cases(distribution))
    # A case says better than the defaults how to make it.
    tried: set[type] = {type(case.scorer) for case in cases if isinstance(case, ScorerCase)}
    tried |= {type(case.reducer) for case in cases if isinstance(case, ReducerCase)}
    for origin, factory in _steps():
        if _normal(origin) == _normal(distribution) and factory not in tried:
            yield factory
    yield from cases


def _steps() -> list[tuple[str, type[Scorer] | type[Reducer]]]:
    """Classes of all scorers and reducers, and where they come from."""
    known = registry()
    return [
        *((offer.origin, offer.plugin.factory) for offer in known.scorers),
        *((offer.origin, offer.plugin.factory) for offer in known.reducers),
    ]


@cache
def _cases(distribution: str) -> tuple[Case, ...]:
    found = [
        entry
        for entry in entry_points(group=GROUP)
        if entry.dist is not None and _normal(entry.dist.name) == _normal(distribution)
    ]
    offered: Iterable[Subject] = (each for entry in found for each in entry.load()())
    return tuple(case for subject in offered for case in cases_of(subject))


def _adapters(distribution: str) -> list[str]:
    known = registry()
    named = [
        *((offer.origin, f"tower {offer.plugin.name}") for offer in known.towers),
        *((offer.origin, f"model {offer.plugin.name}") for offer in known.models),
    ]
    return [name for origin, name in named if _normal(origin) == _normal(distribution)]


@cache
def _covered(distribution: str) -> set[str]:
    """The adapters for which there are cases."""
    known, covered = registry(), set()
    for case in _cases(distribution):
        if isinstance(case, TowerCase):
            plugin = known.claiming(known.towers, case.build(), case.adapter)
            covered.add(f"tower {plugin.name}")
        elif isinstance(case, ModelCase):
            covered.add(f"model {known.claiming(known.models, case.build(), case.adapter).name}")
    return covered


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
