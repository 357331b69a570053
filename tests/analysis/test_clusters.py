"""Colours of merged patches: different, and different for those who see fewer colours."""

from __future__ import annotations

import itertools

import pytest
import torch

from tokenprune import Plan
from tokenprune.analysis.clusters import PALETTE, colours
from tokenprune.analysis.fate import Fate


def fate(groups: list[int]) -> Fate:
    return Fate.of(Plan.group(torch.tensor([groups]), torch.ones(1, len(groups))))


@pytest.mark.parametrize("count", [1, 7, 21])
def test_every_group_has_a_colour_of_its_own(count: int) -> None:
    """Each of `count` groups has a patch on the left and one on the right of a wide grid."""
    given = colours(fate([*range(count), *range(count)]), (2, count))
    assert len(set(given.values())) == len(given) == count


def test_where_groups_are_more_than_colours_those_that_touch_differ() -> None:
    """63 groups of 2 x 2 patches, 21 in a row: taking colours in turn would repeat them below."""
    high, wide = grid = (6, 42)
    numbers = [row // 2 * 21 + column // 2 for row in range(high) for column in range(wide)]
    known = fate(numbers)
    given = colours(known, grid)
    assert len(given) == 63
    assert len(set(given.values())) == len(PALETTE)
    (slots,) = known.crops
    for row, column in itertools.product(range(high - 1), range(wide - 1)):
        here = slots[wide * row + column]
        for down, right in ((0, 1), (1, 0), (1, 1)):
            other = slots[wide * (row + down) + column + right]
            assert other == here or given[other] != given[here]


def luminance(colour: tuple[int, int, int]) -> float:
    """Relative luminance as WCAG 2 defines it."""
    linear = [
        part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4
        for part in (value / 255 for value in colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# Red and green as a deuteranope and a protanope see them: linear RGB (Vienot and others, 1999).
SEEN = {
    "deuteranopia": ((0.29275, 0.70725, 0.0), (0.29275, 0.70725, 0.0), (-0.02234, 0.02234, 1.0)),
    "protanopia": ((0.11238, 0.88762, 0.0), (0.11238, 0.88762, 0.0), (0.00401, -0.00401, 1.0)),
}


@pytest.mark.parametrize("who", SEEN)
def test_the_first_seven_stay_apart_for_the_colour_blind(who: str) -> None:
    def seen(colour: tuple[int, int, int]) -> list[float]:
        linear = [(value / 255) ** 2.2 for value in colour]
        rows = [sum(a * b for a, b in zip(row, linear, strict=True)) for row in SEEN[who]]
        return [255 * max(value, 0) ** (1 / 2.2) for value in rows]

    for one, other in itertools.combinations(PALETTE[:7], 2):
        distance = max(abs(a - b) for a, b in zip(seen(one), seen(other), strict=True))
        assert distance > 25, (one, other)


def test_lightness_tells_the_three_shades_of_a_hue_apart() -> None:
    for hue in range(7):
        dark, plain, light = (luminance(PALETTE[hue + 7 * shade]) for shade in (2, 0, 1))
        assert dark < plain < light
        assert (light + 0.05) / (dark + 0.05) > 1.8
