"""`parametrize_with_checks`: the contract as pytest parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import pytest

from ..errors import SpecError, UnknownNameError
from . import model_uses, models, reducers, scorers, towers
from .cases import Case, Subject, cases_of
from .promises import CHECKS, OPTIONAL, Check, in_order

F = TypeVar("F", bound=Callable[..., Any])

SECTIONS = (scorers, reducers, towers, models, model_uses)
"""The modules that hold the checks, in the order of the contract."""


def checks_for(case: Case) -> Iterator[Check]:
    """The checks that apply to `case`, opt-outs included."""
    return (check for check in CHECKS.values() if isinstance(case, check.subject))


def run_check(number: str, subject: Subject) -> None:
    """Test one promise of `subject`, such as "S3".

    Raises:
        AssertionError: it is broken, or cannot be looked at.
        UnknownNameError: no promise has this number.
        SpecError: `subject` is nothing that can be checked, or the promise is about other things.
    """
    if number not in CHECKS:
        raise UnknownNameError(
            f"no promise has the number {number!r}; there are {', '.join(in_order(CHECKS))}"
        )
    check = CHECKS[number]
    for case in cases_of(subject):
        if not isinstance(case, check.subject):
            raise SpecError(
                f"{number} is a promise for a {check.subject.__name__}, not for {case.name}, of "
                f"which {', '.join(each.number for each in checks_for(case))} are made"
            )
        try:
            check(case)
        except pytest.skip.Exception as skipped:
            raise AssertionError(f"{number} cannot be looked at: {skipped}") from skipped


def parameters(subjects: Iterable[Subject]) -> list[Any]:
    """A `pytest.param(case, check)` for every check of every subject, with its marks."""
    cases = [case for subject in subjects for case in cases_of(subject)]
    return [_parameter(case, check) for case in cases for check in _known(case)]


def parametrize_with_checks(subjects: Iterable[Subject]) -> Callable[[F], F]:
    """Run every check of the contract on every subject.

    Args:
        subjects: scorers, reducers (instances, or classes to make with their defaults), and
            `ScorerCase`, `ReducerCase`, `TowerCase` or `ModelCase` objects.

    For example, in a test file:

        @parametrize_with_checks([SharpnessScorer()])
        def test_contract(case, check):
            check(case)
    """
    return pytest.mark.parametrize(("case", "check"), parameters(subjects))


def _known(case: Case) -> Iterator[Check]:
    for title, numbers in (("exempt", case.exempt), ("expected_failures", case.expected_failures)):
        _validate(case, title, numbers)
    return checks_for(case)


def _validate(case: Case, title: str, numbers: Mapping[str, str]) -> None:
    applicable = {check.number for check in checks_for(case)}
    for number, reason in numbers.items():
        if number not in applicable:
            raise SpecError(
                f"{title} of {case.name} names {number!r}; its promises are "
                + ", ".join(in_order(applicable))
            )
        if not reason.strip():
            raise SpecError(f"{title} of {case.name} gives no reason for {number}")
        if title == "exempt" and number not in OPTIONAL:
            raise SpecError(
                f"{case.name} opts out of {number}, which every strategy must keep; optional are "
                + ", ".join(in_order(OPTIONAL))
            )


def _parameter(case: Case, check: Check) -> Any:
    marks = []
    if check.number in case.exempt:
        marks.append(pytest.mark.skip(reason=f"opts out: {case.exempt[check.number]}"))
    elif check.number in case.expected_failures:
        reason = case.expected_failures[check.number]
        marks.append(pytest.mark.xfail(strict=True, reason=reason))
    return pytest.param(case, check, id=f"{case.name}-{check.name}", marks=marks)
