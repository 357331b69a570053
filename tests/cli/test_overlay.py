"""Overlays on hand-made plans; pixels are read with Pillow."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tokenprune import Plan, ShapeError
from tokenprune.analysis.overlay import magnify, overlay, picture_of, side_by_side
from tokenprune_adapters import pocket
from tokenprune_adapters.pocket.model import build_processor

GRID = (2, 3)
PATCH = 4


@pytest.fixture
def picture() -> Image.Image:
    """12 x 8 pixels, all different and none dark: 2 x 3 patches of 4 pixels."""
    picture = Image.new("RGB", (12, 8))
    for x in range(12):
        for y in range(8):
            picture.putpixel((x, y), (100 + x, 150 + y, 200 + x + y))
    return picture


def patch(picture: Image.Image, number: int) -> list[tuple[int, int, int]]:
    """The pixels of one patch."""
    top, left = number // 3 * PATCH, number % 3 * PATCH
    return [
        picture.getpixel((x, y)) for y in range(top, top + PATCH) for x in range(left, left + PATCH)
    ]


def test_kept_patches_are_untouched_and_dropped_ones_dark(picture: Image.Image) -> None:
    keep = torch.tensor([[True] * 6, [False, True, False, False, True, True]])
    drawn = overlay(picture, Plan.select(keep), GRID, row=1)
    assert drawn.size == picture.size
    for number in range(6):
        before, after = patch(picture, number), patch(drawn, number)
        if keep[1, number]:
            assert after == before
        else:
            assert all(sum(new) < 0.25 * sum(old) for new, old in zip(after, before, strict=True))


def test_another_row_is_another_picture(picture: Image.Image) -> None:
    plan = Plan.select(torch.tensor([[True] * 6, [False] * 5 + [True]]))
    assert overlay(picture, plan, GRID).tobytes() == picture.tobytes()
    assert patch(overlay(picture, plan, GRID, row=1), 0) != patch(picture, 0)


def test_merged_patches_share_a_colour_and_single_ones_are_untouched(picture: Image.Image) -> None:
    groups = torch.tensor([[0, 0, 1, 3, 3, -1]])  # patch 2 alone, patch 5 dropped
    drawn = overlay(picture, Plan.group(groups, torch.ones(1, 6)), GRID)
    assert patch(drawn, 2) == patch(picture, 2)
    assert max(map(max, patch(drawn, 5))) < 60

    def tint(number: int) -> tuple[int, ...]:
        """What was mixed into the patch: the drawn pixel less the part of the old one."""
        new, old = patch(drawn, number)[0], patch(picture, number)[0]
        return tuple(round((n - 0.45 * o) / 0.55) for n, o in zip(new, old, strict=True))

    def near(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
        return all(abs(a - b) <= 3 for a, b in zip(one, other, strict=True))

    assert near(tint(0), tint(1))
    assert near(tint(3), tint(4))
    assert not near(tint(0), tint(3))


def test_what_no_patch_covers_is_dark() -> None:
    """SigLIP's 384 pixels hold 27 patches of 14; here 7 pixels hold 2 patches of 3."""
    picture = Image.new("RGB", (7, 7), (200, 200, 200))
    drawn = overlay(picture, Plan.select(torch.ones(1, 4, dtype=torch.bool)), (2, 2))
    assert drawn.getpixel((5, 5)) == (200, 200, 200)
    assert max(drawn.getpixel((6, 0))) < 60
    assert max(drawn.getpixel((0, 6))) < 60


@pytest.mark.parametrize(
    ("grid", "row", "words"),
    [
        ((2, 2), 0, "a grid of 2 x 2 has 4 patches, but the plan is for 6 visual tokens"),
        ((2, 3), 1, r"row must be in \[0, 1\), got 1"),
    ],
)
def test_refuses_what_does_not_fit(
    picture: Image.Image, grid: tuple[int, int], row: int, words: str
) -> None:
    with pytest.raises(ShapeError, match=words):
        overlay(picture, Plan.select(torch.ones(1, 6, dtype=torch.bool)), grid, row)


def test_picture_of_undoes_the_processor(wide_picture: Image.Image) -> None:
    processor = build_processor().image_processor
    pixels = processor(images=wide_picture, return_tensors="pt")["pixel_values"][0]
    seen = picture_of(pixels, processor.image_mean, processor.image_std)
    assert seen.tobytes() == pocket.draw(4).picture.tobytes()


def test_picture_of_refuses_a_batch() -> None:
    with pytest.raises(ShapeError, match=r"axes \(3 height width\), got \(2, 3, 8, 8\)"):
        picture_of(torch.zeros(2, 3, 8, 8), [0.5] * 3, [0.5] * 3)


def test_magnify_repeats_pixels(picture: Image.Image) -> None:
    large = magnify(picture, 20)
    assert large.size == (36, 24)
    assert {large.getpixel((x, y)) for x in range(3) for y in range(3)} == {(100, 150, 200)}


def test_side_by_side_shows_every_picture(picture: Image.Image) -> None:
    sheet = side_by_side({"one": picture, "two": Image.new("RGB", picture.size, (9, 9, 9))}, gap=5)
    high = sheet.height - 5 - picture.height
    assert sheet.crop((5, high, 17, high + 8)).tobytes() == picture.tobytes()
    assert sheet.getpixel((22, high)) == (9, 9, 9)
    title = sheet.crop((0, 0, 22, high)).convert("L")
    assert title.getextrema()[0] < 100
