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
    members = Counter(source)
    merged = [slot >= 0 and members[slot] > 1 for slot in source]

    picture = picture.convert("RGB")
    tint = _spread([_colour(max(slot, 0)) for slot in source], grid, picture)
    tinted = Image.blend(picture, tint, TINT)
    dark = picture.point(lambda value: int(value * DARK))
    grouped = _spread([255 * mark for mark in merged], grid, picture)
    kept = _spread([255 * (slot >= 0) for slot in source], grid, picture)
    return Image.composite(Image.composite(tinted, picture, grouped), dark, kept)


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
