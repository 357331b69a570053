"""`Keep`: half-up rounding against exact arithmetic, and what it refuses."""

from __future__ import annotations

import math
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from core.generators import kept_count
from tokenprune import Budgeted, BudgetError, Evict, Keep

FRACTIONS = st.floats(0, 1, exclude_min=True) | st.integers(1, 1000).map(lambda n: n / 1000)
TOKENS = st.integers(0, 20_000)


@given(FRACTIONS, TOKENS)
@example(0.5, 5)  # Python's round gives 2
@example(0.5, 7)
@example(0.145, 100)  # 14.5 as written, less as a binary number
@example(5e-324, 576)
@example(1.0, 0)
def test_fractions_round_half_up_as_they_are_written(fraction: float, tokens: int) -> None:
    count = Keep(fraction).count(tokens)
    assert count == kept_count(fraction, tokens)
    written = (Decimal(repr(fraction)) * tokens).to_integral_value(ROUND_HALF_UP)
    assert count == min(max(int(written), 1), tokens)
    assert abs(count - Fraction(repr(fraction)) * tokens) <= 1
    assert type(count) is int


def test_other_ways_of_rounding_differ() -> None:
    """A meta-test: banker's rounding, truncation and binary fractions give other counts."""
    assert [Keep(0.5).count(n) for n in (1, 3, 5, 7)] == [1, 2, 3, 4]
    assert [round(0.5 * n) for n in (1, 3, 5, 7)] == [0, 2, 2, 4]
    assert Keep(0.222).count(576) == 128
    assert int(0.222 * 576) == 127
    assert Keep(0.145).count(100) == 15
    assert math.floor(Fraction(0.145) * 100 + Fraction(1, 2)) == 14


@given(st.integers(0, 1000), TOKENS)
def test_counts_are_counts(amount: int, tokens: int) -> None:
    assert Keep(amount).count(tokens) == min(amount, tokens)


@given(FRACTIONS, FRACTIONS, TOKENS)
def test_a_larger_fraction_keeps_no_fewer(one: float, other: float, tokens: int) -> None:
    low, high = sorted((one, other))
    assert Keep(low).count(tokens) <= Keep(high).count(tokens)


@given(st.integers(0, 999), TOKENS)
def test_pruning_rates_are_what_is_removed(thousandths: int, tokens: int) -> None:
    keep = Keep.from_pruning_rate(thousandths / 1000)
    assert keep.amount == (1000 - thousandths) / 1000
    assert keep.count(tokens) == kept_count(keep.amount, tokens)


def test_pruning_rates_of_the_papers() -> None:
    assert Keep.from_pruning_rate(0.9, per="crop") == Keep(0.1, "crop")  # 1 - 0.9 is not 0.1
    assert 1 - 0.9 != 0.1
    assert Keep.from_pruning_rate(0).count(576) == 576
    assert Keep.from_pruning_rate(0.778).count(576) == 128


@pytest.mark.parametrize(
    ("amount", "as_python"),
    [(np.int64(5), 5), (np.float64(0.25), 0.25), (torch.tensor(7), 7), (np.uint8(0), 0)],
)
def test_numbers_of_other_libraries_become_python_numbers(amount: int, as_python: object) -> None:
    keep = Keep(amount)
    assert type(keep.amount) is type(as_python)
    assert keep == Keep(as_python)  # type: ignore[arg-type]
    assert repr(Evict(amount)) == f"Evict(keep={as_python!r}, per='image')"
    assert keep.count(100) == Keep(as_python).count(100)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("amount", "words"),
    [
        (-1, "a count of tokens to keep must be >= 0, got -1"),
        (0.0, "a fraction to keep must be in (0, 1], got 0.0"),
        (1.5, "must be in (0, 1], got 1.5; write a count of tokens as an int, e.g. 128"),
        (128.0, "got 128.0; write a count of tokens as an int"),
        (-0.5, "got -0.5"),
        (float("nan"), "got nan"),
        (float("inf"), "got inf"),
        (True, "keep must be an int (count) or a float (fraction), got True"),
        (False, "got False"),
        ("128", "keep must be an int (count) or a float (fraction), got '128'"),
        (None, "got None"),
        ([1], "got [1]"),
        (1j, "got 1j"),
        (Fraction(1, 2), "got Fraction(1, 2)"),
        (torch.tensor(0.5), "got tensor(0.5000)"),
    ],
)
def test_what_is_no_budget_is_refused(amount: float, words: str) -> None:
    for make in (Keep, Evict, Budgeted):
        with pytest.raises(BudgetError) as caught:
            make(amount)
        assert words in str(caught.value)
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("rate", [1, 1.0, 1.5, -0.1, float("nan")])
def test_pruning_rates_outside_of_zero_to_one_are_refused(rate: float) -> None:
    with pytest.raises(BudgetError, match=r"a pruning rate must be in \[0, 1\), got"):
        Keep.from_pruning_rate(rate)


@pytest.mark.parametrize("per", ["", "images", 3, None])
def test_unknown_units_are_refused(per: object) -> None:
    for make in (Keep, Evict):
        with pytest.raises(BudgetError, match="per must be one of image, crop, frame, got"):
            make(5, per)  # type: ignore[arg-type]


def test_a_reducer_takes_a_number_or_a_budget() -> None:
    assert Evict(Keep(0.25, "crop")) == Evict(0.25, per="crop")
    assert Evict(0.25, per="crop").budget == Keep(0.25, "crop")
    assert Evict(5).budget == Keep(5)
    assert Evict(Keep(5, "crop"), per="crop").per == "crop"
    with pytest.raises(BudgetError) as caught:
        Evict(Keep(5), per="crop")
    assert str(caught.value) == ("per='crop' contradicts Keep(amount=5, per='image'); give it once")
