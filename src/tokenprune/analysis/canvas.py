"""Pictures as a model saw them, patch by patch. Needs Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from ..errors import ShapeError

Grid = tuple[int, int]
"""Patches in height and width."""

Colour = tuple[int, int, int]
"""Red, green, blue, 0 to 255."""

PAPER: Colour = (255, 255, 255)
INK: Colour = (28, 28, 30)


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


def magnify(picture: Image.Image, least: int = 384) -> Image.Image:
    """`picture` with every pixel a square, so that its shorter side is at least `least`."""
    return enlarged(picture, times(picture, least))


def times(picture: Image.Image, least: int) -> int:
    """By how much to enlarge, so that the shorter side is at least `least`."""
    return -(-least // min(picture.size))


def enlarged(picture: Image.Image, scale: int) -> Image.Image:
    """`picture` in RGB with every pixel a square of `scale` pixels."""
    size = picture.width * scale, picture.height * scale
    return picture.convert("RGB").resize(size, Image.Resampling.NEAREST)


def side_of_patch(picture: Image.Image, grid: Grid) -> int:
    """Pixels a side of a patch.

    Where patches do not divide a picture, towers leave out what remains at right and bottom.
    """
    high, wide = grid
    return min(picture.width // wide, picture.height // high)


def spread(
    values: Sequence[int] | Sequence[Colour], grid: Grid, size: tuple[int, int], patch: int
) -> Image.Image:
    """One gray or colour per patch as a picture of `size`; zero beyond the grid.

    Args:
        values: by rows of the grid.
        grid: patches in height and width.
        size: width and height in pixels.
        patch: pixels a side of a patch.
    """
    high, wide = grid
    flat = [part for one in values for part in ((one,) if isinstance(one, int) else one)]
    mode = "L" if isinstance(values[0], int) else "RGB"
    small = Image.frombytes(mode, (wide, high), bytes(flat))
    full = Image.new(mode, size)
    full.paste(small.resize((wide * patch, high * patch), Image.Resampling.NEAREST))
    return full


def laid_out(crops: Sequence[Image.Image], tiles: Grid | None, gap: int) -> Image.Image:
    """A picture that is not cut; a base view and its tiles; or crops in their order, in rows.

    Args:
        crops: all of one size.
        tiles: tiles in height and width behind a base view, or None.
        gap: pixels between crops that are not neighbours.
    """
    if tiles is not None:
        return arranged(crops, tiles, gap)
    across = math.ceil(math.sqrt(len(crops)))
    down = math.ceil(len(crops) / across)
    wide, high = (side + gap for side in crops[0].size)
    sheet = Image.new("RGB", (across * wide - gap, down * high - gap), PAPER)
    for number, crop in enumerate(crops):
        sheet.paste(crop, (number % across * wide, number // across * high))
    return sheet


def arranged(crops: Sequence[Image.Image], tiles: Grid, gap: int) -> Image.Image:
    """The base view of an any-resolution model, and beside it its tiles put together.

    Args:
        crops: the base view, then the tiles by rows, all of one size.
        tiles: tiles in height and width.
        gap: pixels between base view and tiles.
    """
    down, across = tiles
    if len(crops) != 1 + down * across:
        raise ShapeError(
            f"{down} x {across} tiles and a base view are {1 + down * across} crops, got "
            f"{len(crops)}"
        )
    wide, high = crops[0].size
    sheet = Image.new("RGB", (wide + gap + across * wide, down * high), PAPER)
    sheet.paste(crops[0], (0, (down * high - high) // 2))
    for number, tile in enumerate(crops[1:]):
        sheet.paste(tile, (wide + gap + number % across * wide, number // across * high))
    return sheet
