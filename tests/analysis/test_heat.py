"""Heat maps: pixels are read with Pillow."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from PIL import Image

from tokenprune import ShapeError
from tokenprune.analysis.heat import ABSENT, colour_at, ends, heat, heat_crops

GRID = (2, 2)


@pytest.fixture
def picture() -> Image.Image:
    return Image.new("RGB", (16, 16), (128, 128, 128))


def middle(drawn: Image.Image, number: int, patch: int = 8) -> tuple[int, int, int]:
    return drawn.getpixel((number % 2 * patch + patch // 2, number // 2 * patch + patch // 2))


def test_patches_have_the_colour_of_their_score(picture: Image.Image) -> None:
    drawn = heat(picture, torch.tensor([2.0, 4.0, 3.0, 2.5]), GRID, opacity=1)
    for number, part in enumerate((0, 1, 0.5, 0.25)):
        assert middle(drawn, number) == colour_at(part)


def test_the_scale_below_runs_from_lowest_to_highest(picture: Image.Image) -> None:
    drawn = heat(picture, [0.0, 1.0, 2.0, 3.0], GRID, opacity=1)
    assert drawn.height > picture.height
    bar = [drawn.getpixel((x, 26)) for x in range(16)]
    assert bar[0] == colour_at(0)
    assert bar[-1] == colour_at(1)
    assert all(one != other for one, other in itertools.pairwise(bar))


def test_the_ends_of_the_scale_are_written_below_it() -> None:
    """Other scores, other numbers; where they stand there is nothing else."""
    wide = Image.new("RGB", (120, 120), (128, 128, 128))
    one, other = (heat(wide, [low, 2.0, 3.0, 4.0], GRID) for low in (-1.5, 1.0))
    below = [each.crop((0, 137, 120, each.height)).convert("L") for each in (one, other)]
    for each in below:
        assert each.getextrema()[0] < 100
        last = each.crop((0, each.height - 1, 120, each.height))
        assert last.getextrema()[0] == 255  # nothing is cut off
    left, right = (0, 0, 60, below[0].height), (60, 0, 120, below[0].height)
    assert below[0].crop(left).tobytes() != below[1].crop(left).tobytes()
    assert below[0].crop(right).tobytes() == below[1].crop(right).tobytes()


def test_the_scale_has_the_colours_that_are_drawn(picture: Image.Image) -> None:
    drawn = heat(picture, [0.0, 1.0, 0.5, 0.0], GRID)
    low, high = drawn.getpixel((0, 26)), drawn.getpixel((15, 26))
    for number, end in ((0, low), (1, high)):
        assert all(abs(a - b) <= 1 for a, b in zip(middle(drawn, number), end, strict=True))


def test_infinities_have_the_colours_of_the_ends_and_nan_is_gray(picture: Image.Image) -> None:
    scores = [-math.inf, math.inf, math.nan, 5.0]
    drawn = heat(picture, scores, GRID, opacity=1)
    assert ends(scores) == (5.0, 5.0)
    assert [middle(drawn, n) for n in range(3)] == [colour_at(0), colour_at(1), ABSENT]
    assert middle(drawn, 3) == colour_at(0.5)
    scores[2] = 7.0
    drawn = heat(picture, scores, GRID, opacity=1)
    parts = (0, 1, 1, 0)
    assert [middle(drawn, n) for n in range(4)] == [colour_at(part) for part in parts]


def test_crops_share_one_scale(picture: Image.Image) -> None:
    crops = [[0.0, 1.0, 2.0, 3.0], [4.0, 8.0, math.nan, 0.0]]
    drawn = heat_crops([picture] * 2, crops, GRID, tiles=(1, 1), opacity=1)
    assert middle(drawn, 3) == colour_at(3 / 8)
    tile = drawn.crop((16 + 6, 0, 38, 16))
    assert [middle(tile, n) for n in range(4)] == [
        colour_at(0.5),
        colour_at(1),
        ABSENT,
        colour_at(0),
    ]


def test_lightness_rises_along_the_scale() -> None:
    """So the scale reads in gray, too."""
    gray = [
        0.2126 * r + 0.7152 * g + 0.0722 * b
        for r, g, b in map(colour_at, torch.linspace(0, 1, 64).tolist())
    ]
    assert gray == sorted(gray)
    assert len(set(gray)) == 64


def test_refuses_other_numbers_of_scores(picture: Image.Image) -> None:
    with pytest.raises(ShapeError, match="a grid of 2 x 2 has 4 patches, got 3 scores"):
        heat(picture, [1.0, 2.0, 3.0], GRID)
