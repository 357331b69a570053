"""The contract: every promise is one function, whose docstring states it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from ..errors import MissingSignalError
from .cases import Case, ModelCase, ReducerCase, ScorerCase, TowerCase

T = TypeVar("T")
C = TypeVar("C", ScorerCase, ReducerCase, TowerCase, ModelCase)

OPTIONAL = frozenset({"S1", "S5", "S8", "P3", "P6", "P7", "P8", "P10", "P12", "P18"})
"""Promises that a method may leave out, with a reason: ``exempt = {"S5": "looks at places"}``."""


@dataclass(frozen=True)
class Check:
    """A promise that can be tested.

    Attributes:
        number: such as "S3".
        name: name of the function, such as "check_s3_row_ignores_its_batch_mates".
        states: the promise in a sentence.
        subject: the class of cases to which it applies.
    """

    number: str
    name: str
    states: str
    subject: type[Case]
    function: Callable[[Any], None]

    def __call__(self, case: Case) -> None:
        """Test `case`.

        Raises:
            AssertionError: the promise is broken; the message begins with its number and sentence
                and says how.
        """
        try:
            self.function(case)
        except AssertionError as error:
            # The same error, since notes on it hold the example.
            error.args = (f"{self.number} is broken: {self.states}\n{error}",)
            raise
        except MissingSignalError as error:
            if self.number in TELL_SIGNALS or not isinstance(case, (ScorerCase, ReducerCase)):
                raise
            # One failure for one mistake: that of the promise which is about it.
            tells = "S7" if isinstance(case, ScorerCase) else "P14"
            pytest.skip(f"reads what it does not declare, which {tells} tells: {error}")


TELL_SIGNALS = ("S7", "P14")
"""Promises about the signals that a step declares."""

CHECKS: dict[str, Check] = {}
"""Every check, by number."""

_NAME = re.compile(r"check_([a-z])(\d+)_\w+")


def promise(subject: type[C]) -> Callable[[Callable[[C], None]], Callable[[C], None]]:
    """Enter a function called ``check_<number>_<what>`` into the contract for `subject`."""

    def enter(function: Callable[[C], None]) -> Callable[[C], None]:
        match = _NAME.fullmatch(function.__name__)
        assert match is not None, function
        assert function.__doc__, function
        number = match[1].upper() + match[2]
        assert number not in CHECKS, number
        states = function.__doc__.strip().partition("\n\n")[0]
        CHECKS[number] = Check(
            number, function.__name__, " ".join(states.split()), subject, function
        )
        return function

    return enter


def for_all(
    strategy: SearchStrategy[T], most: int | None = None
) -> Callable[[Callable[[T], None]], None]:
    """Run the decorated function on what `strategy` draws, at once.

    The number of examples is that of the hypothesis profile in force, or `most` if that is less.
    """

    def run(holds: Callable[[T], None]) -> None:
        # Explanations point at lines of this kit, and cost more than all the rest.
        phases = [phase for phase in settings().phases if phase != Phase.explain]
        examples = settings().max_examples
        chosen = settings(
            max_examples=examples if most is None else min(examples, most),
            deadline=None,
            report_multiple_bugs=False,
            phases=phases,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        )
        chosen(given(strategy)(holds))()

    return run


def in_order(numbers: Iterable[str]) -> list[str]:
    """Numbers of promises in the order of the contract: S2 before S10."""
    return sorted(numbers, key=lambda number: ("SPTM".find(number[:1]), int(number[1:] or 0)))


def require(kept: bool, message: str) -> None:
    """Fail with `message` unless the promise is kept."""
    if not kept:
        raise AssertionError(message)
