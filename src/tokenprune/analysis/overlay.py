"""Pictures of what a plan did: discarded patches are dark, merged ones share a colour.

Draw on the pixels that the model saw (`picture_of`), so that patches line up exactly with what the
image processor cropped. VTC-CLS (arXiv 2412.05819) shows such pictures in its figure 4.
"""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..errors import ShapeError
from ..plan import Plan

DARK = 0.22
"""What is left of the brightness of a discarded patch."""

ABSENT = (128, 128, 128)
"""The colour of what is no token, although it is in a crop."""

TINT = 0.55
"""How much of a merged patch is the colour of its group."""


def picture_of(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """The picture behind `pixel_values`, as the model saw it.

    Args:
        pixels: `(3, height, width)`, one entry of what an image processor returns.
        mean: the processor's `image_mean`.
        std: the processor's `image_std`.

    >>> picture_of(torch.zeros(3, 4, 6), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)).size
    (6, 4)
    """
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ShapeError(f"pixels must have axes (3 height width), got {tuple(pixels.shape)}")
    scale, shift = (torch.tensor(list(values))[:, None, None] for values in (std, mean))
    values = (pixels.detach().cpu().float() * scale + shift) * 255
    channels = values.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    height, width = pixels.shape[1:]
    return Image.frombytes("RGB", (width, height), bytes(channels.flatten().tolist()))


def overlay(picture: Image.Image, plan: Plan, grid: tuple[int, int], row: int = 0) -> Image.Image:
    """`picture` with its discarded patches dark.

    Kept patches are copied bit for bit. Where tokens were merged, the patches of each group of two
    or more are tinted in one colour.

    Args:
        picture: what the model saw, see `picture_of`.
        plan: what became of its visual tokens, e.g. `attachment.last.plan`.
        grid: patches in height and width.
        row: row of the plan.

    Raises:
        ShapeError: the plan is not for that many patches, or has no such row.
    """
    high, wide = grid
    if plan.tokens != high * wide:
        raise ShapeError(
            f"a grid of {high} x {wide} has {high * wide} patches, but the plan is for "
            f"{plan.tokens} visual tokens"
        )
    if not 0 <= row < plan.anchors.shape[0]:
        raise ShapeError(f"row must be in [0, {plan.anchors.shape[0]}), got {row}")
    source = plan.source()[row].tolist()
    return _drawn(picture, source, _groups(source), grid)


def overlay_crops(
    crops: Sequence[Image.Image],
    plan: Plan,
    places: Tensor,
    grid: tuple[int, int],
    tiles: tuple[int, int],
    row: int = 0,
    gap: int = 6,
) -> Image.Image:
    """A picture of an any-resolution model: its base view, and beside it its tiles put together.

    As `overlay` draws them; patches that are no token at all, because unpadding cut them away, are
    gray.

    Args:
        crops: what the model saw: the base view, then the tiles by rows.
        plan: what became of the visual tokens.
        places: `(tokens,)` int64, the crop times patches per crop plus patch of each slot of the
            plan: a row of `Reduction.places`.
        grid: patches in height and width of a crop.
        tiles: tiles in height and width.
        row: row of the plan.
        gap: pixels between base view and tiles.

    Raises:
        ShapeError: the crops are not as many as the tiles and the base view, or the plan is for
            other tokens.
    """
    down, across = tiles
    patches = grid[0] * grid[1]
    if len(crops) != 1 + down * across:
        raise ShapeError(
            f"{down} x {across} tiles and a base view are {1 + down * across} crops, got "
            f"{len(crops)}"
        )
    if not 0 <= row < plan.anchors.shape[0]:
        raise ShapeError(f"row must be in [0, {plan.anchors.shape[0]}), got {row}")
    if tuple(places.shape) != (plan.tokens,) or int(places.max()) >= patches * len(crops):
        raise ShapeError(
            f"places must be {plan.tokens} numbers below {patches * len(crops)}, one for each "
            f"slot of the plan, got {tuple(places.shape)} up to {int(places.max())}"
        )
    source = plan.source()[row].tolist()
    of_patch: list[int | None] = [None] * (patches * len(crops))
    # Padding of a row says that it is patch 0: what is kept is written last.
    for place, slot in sorted(zip(places.tolist(), source, strict=True), key=lambda each: each[1]):
        of_patch[place] = slot
    grouped = _groups(source)
    drawn = [
        _drawn(crop, of_patch[n * patches : (n + 1) * patches], grouped, grid)
        for n, crop in enumerate(crops)
    ]
    wide, high = drawn[0].size
    sheet = Image.new("RGB", (wide + gap + across * wide, down * high), (255, 255, 255))
    sheet.paste(drawn[0], (0, (down * high - high) // 2))
    for number, tile in enumerate(drawn[1:]):
        sheet.paste(tile, (wide + gap + number % across * wide, number // across * high))
    return sheet


def _groups(source: Sequence[int]) -> frozenset[int]:
    """Kept tokens that stand for several slots."""
    return frozenset(slot for slot, count in Counter(source).items() if slot >= 0 and count > 1)


def _drawn(
    picture: Image.Image,
    source: Sequence[int | None],
    groups: frozenset[int],
    grid: tuple[int, int],
) -> Image.Image:
    """One crop.

    Args:
        picture: what the model saw.
        source: for each patch the number of the kept token that it is part of, -1 where it was
            discarded, None where it never was a token.
        groups: numbers of tokens that several patches are part of.
        grid: patches in height and width.
    """
    picture = picture.convert("RGB")
    tint = _spread([_colour(max(slot or 0, 0)) for slot in source], grid, picture)
    tinted = Image.blend(picture, tint, TINT)
    dark = picture.point(lambda value: int(value * DARK))
    merged = _spread([255 * (slot in groups) for slot in source], grid, picture)
    kept = _spread([255 * (slot is not None and slot >= 0) for slot in source], grid, picture)
    shown = Image.composite(Image.composite(tinted, picture, merged), dark, kept)
    if None not in source:
        return shown
    absent = _spread([255 * (slot is None) for slot in source], grid, picture)
    return Image.composite(Image.new("RGB", picture.size, ABSENT), shown, absent)


def magnify(picture: Image.Image, least: int = 384) -> Image.Image:
    """`picture` with every pixel a square, so that its shorter side is at least `least`."""
    times = -(-least // min(picture.size))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def side_by_side(pictures: Mapping[str, Image.Image], gap: int = 12) -> Image.Image:
    """Pictures of one size in a row, each with its title above it."""
    wide, high = (max(getattr(p, side) for p in pictures.values()) for side in ("width", "height"))
    head = 28
    sheet = Image.new(
        "RGB", ((wide + gap) * len(pictures) + gap, high + head + gap), (255, 255, 255)
    )
    pen = ImageDraw.Draw(sheet)
    for number, (title, picture) in enumerate(pictures.items()):
        left = gap + number * (wide + gap)
        pen.text((left, 7), title, fill=(20, 20, 20), font_size=15)
        sheet.paste(picture, (left, head))
    return sheet


def _spread(
    values: Sequence[int | tuple[int, int, int]], grid: tuple[int, int], like: Image.Image
) -> Image.Image:
    """One gray or colour per patch as a picture of the size of `like`, zero beyond the grid."""
    high, wide = grid
    # Where patches do not divide a picture, towers leave out what remains at right and bottom.
    patch = min(like.width // wide, like.height // high)
    small = Image.new("L" if isinstance(values[0], int) else "RGB", (wide, high))
    pen = ImageDraw.Draw(small)
    for number, value in enumerate(values):
        pen.point((number % wide, number // wide), fill=value)
    full = Image.new(small.mode, like.size)
    full.paste(small.resize((wide * patch, high * patch), Image.Resampling.NEAREST))
    return full


def _colour(group: int) -> tuple[int, int, int]:
    """Neighbouring numbers get hues far apart: steps of the golden ratio around the circle."""
    red, green, blue = colorsys.hsv_to_rgb(group * 0.61803398875 % 1, 0.8, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)
