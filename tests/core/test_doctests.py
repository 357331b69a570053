"""The examples in the docstrings of the core run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import tokenprune

EXTRAS = ("tokenprune.cli", "tokenprune.testing")
"""Packages that need an extra; their own tests look after them."""

MODULES = sorted(
    found.name
    for found in pkgutil.walk_packages(tokenprune.__path__, "tokenprune.")
    if not found.name.startswith(EXTRAS)
)


@pytest.mark.parametrize("name", ["tokenprune", *MODULES])
def test_examples_in_docstrings(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [t for t in finder.find(tokenprune.Plan, "Plan") if t.examples]
    assert {test.name for test in found} >= {"Plan.select", "Plan.source"}


def test_a_wrong_example_is_noticed() -> None:
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    with pytest.raises(doctest.DocTestFailure):
        doctest.DebugRunner().run(wrong)
