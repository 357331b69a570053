"""Overlays on hand-made plans; pixels are read with Pillow."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tokenprune import Plan, ShapeError
from tokenprune.analysis.canvas import enlarged, magnify, picture_of
from tokenprune.analysis.clusters import PALETTE
from tokenprune.analysis.overlay import TINT, overlay
from tokenprune.analysis.sheet import side_by_side
from tokenprune_adapters import pocket
from train_pocket.model import build_processor

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

    def hue(number: int) -> tuple[float, ...]:
        """Of the colour of the group: a gray picture adds the same to all three channels."""
        pixel = patch(drawn, number)[5]
        return tuple(part - min(pixel) for part in pixel)

    def near(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
        return all(abs(a - b) <= 2 for a, b in zip(one, other, strict=True))

    assert near(hue(0), hue(1))
    assert near(hue(3), hue(4))
    assert not near(hue(0), hue(3))
    for number, colour in ((0, PALETTE[0]), (3, PALETTE[1])):
        assert near(hue(number), tuple(TINT * (part - min(colour)) for part in colour))


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
        ((2, 3), 1, r"row must be in \[0, 1\), .* got 1"),
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


def test_lines_lie_on_what_is_not_kept_alone(picture: Image.Image) -> None:
    """Enlarged, kept patches are still copied, and their edge is seen on any background."""
    black = Image.new("RGB", picture.size)
    keep = torch.tensor([[False, True, False, False, True, True]])
    for ground in (picture, black):
        drawn = overlay(ground, Plan.select(keep), GRID, scale=6)
        assert drawn.size == (72, 48)
        large = enlarged(ground, 6)
        for number in range(6):
            top, left = number // 3 * 24, number % 3 * 24
            box = (left, top, left + 24, top + 24)
            assert (drawn.crop(box).tobytes() == large.crop(box).tobytes()) == bool(keep[0, number])
        # Patch 0 is discarded: a light line on its right, where patch 1 is kept, none below.
        assert min(drawn.getpixel((23, 12))) > 200
        assert max(drawn.getpixel((12, 23))) < 100


def test_groups_that_touch_are_parted_by_a_line_and_numbered() -> None:
    white = Image.new("RGB", (12, 8), (250, 250, 250))
    plan = Plan.group(torch.tensor([[0, 0, 1, 0, 0, 1]]), torch.ones(1, 6))
    drawn = overlay(white, plan, GRID, scale=10)
    assert drawn.getpixel((79, 8)) == drawn.getpixel((80, 8)) == (0, 0, 0)
    assert drawn.getpixel((39, 8)) == drawn.getpixel((40, 8)) != (0, 0, 0)
    # Numbers are white on black; nothing else here is.
    left, right = drawn.crop((0, 0, 78, 80)), drawn.crop((82, 0, 120, 80))
    for part in (left, right):
        found = {colour for _, colour in part.getcolors(9600)}
        assert {(255, 255, 255), (0, 0, 0)} <= found


def test_side_by_side_shows_every_picture(picture: Image.Image) -> None:
    sheet = side_by_side({"one": picture, "two": Image.new("RGB", picture.size, (9, 9, 9))}, gap=5)
    high = sheet.height - 5 - picture.height
    assert sheet.crop((5, high, 17, high + 8)).tobytes() == picture.tobytes()
    assert sheet.getpixel((22, high)) == (9, 9, 9)
    title = sheet.crop((0, 0, 22, high)).convert("L")
    assert title.getextrema()[0] < 100
