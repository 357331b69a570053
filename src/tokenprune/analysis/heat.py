"""Score heat maps: how important each patch of a picture is to a scorer, with a scale."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import ShapeError
from .canvas import INK, PAPER, Colour, Grid, enlarged, laid_out, side_of_patch, spread

# Viridis at nine places: lightness rises evenly, so it reads in gray and for the colour-blind.
_SCALE: tuple[Colour, ...] = (
    (68, 1, 84),
    (71, 45, 123),
    (59, 82, 139),
    (44, 114, 142),
    (33, 145, 140),
    (40, 174, 128),
    (94, 201, 98),
    (173, 220, 48),
    (253, 231, 37),
)

ABSENT: Colour = (128, 128, 128)
"""The colour of a patch without a score."""

_MIDDLE = 128


def colour_at(part: float) -> Colour:
    """The colour of the scale at `part`, 0 for the lowest score and 1 for the highest.

    >>> colour_at(0.0), colour_at(1.0)
    ((68, 1, 84), (253, 231, 37))
    """
    place = min(max(part, 0.0), 1.0) * (len(_SCALE) - 1)
    low = min(int(place), len(_SCALE) - 2)
    pairs = zip(_SCALE[low], _SCALE[low + 1], strict=True)
    red, green, blue = (round(a + (place - low) * (b - a)) for a, b in pairs)
    return red, green, blue


def heat(
    picture: Image.Image,
    scores: Sequence[float] | Tensor,
    grid: Grid,
    scale: int = 1,
    opacity: float = 0.75,
) -> Image.Image:
    """`picture` in gray under the colours of its patches' scores, above a scale with its ends.

    The scale is linear, from the lowest finite score to the highest; -inf and +inf have the colours
    of its ends, NaN is gray.

    Args:
        picture: what the model saw, see `picture_of`.
        scores: `(patches,)`, higher = more important, by rows of the grid.
        grid: patches in height and width.
        scale: by how much to enlarge.
        opacity: 1 hides the picture.

    Raises:
        ShapeError: there are not as many scores as patches.
    """
    values = [float(score) for score in scores]
    if len(values) != grid[0] * grid[1]:
        raise ShapeError(
            f"a grid of {grid[0]} x {grid[1]} has {grid[0] * grid[1]} patches, got {len(values)} "
            "scores"
        )
    return heat_crops([picture], [values], grid, None, scale, opacity)


def heat_crops(
    crops: Sequence[Image.Image],
    scores: Sequence[Sequence[float]],
    grid: Grid,
    tiles: Grid | None,
    scale: int = 1,
    opacity: float = 0.75,
) -> Image.Image:
    """`heat` of an any-resolution picture: base view and tiles, under one scale.

    Args:
        crops: what the model saw: the base view, then the tiles by rows.
        scores: for each crop those of its patches; NaN for what is no token.
        grid: patches in height and width of a crop.
        tiles: tiles in height and width behind a base view; None for one picture alone, or for
            crops in their order.
        scale: by how much to enlarge.
        opacity: 1 hides the picture.
    """
    low, high = ends([score for crop in scores for score in crop])
    drawn = [
        _drawn(crop, of_crop, low, high, grid, scale, opacity)
        for crop, of_crop in zip(crops, scores, strict=True)
    ]
    whole = laid_out(drawn, tiles, gap=6 * scale)
    return _with_scale(whole, low, high, opacity)


def ends(scores: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest finite score; zeros where there is none."""
    finite = [score for score in scores if math.isfinite(score)]
    return (min(finite), max(finite)) if finite else (0.0, 0.0)


def _with_scale(picture: Image.Image, low: float, high: float, opacity: float) -> Image.Image:
    """`picture` above a bar of the scale's colours with the scores at its ends."""
    bar, gap, text = 10, 6, 13
    whole = Image.new("RGB", (picture.width, picture.height + 2 * gap + bar + text), PAPER)
    whole.paste(picture)
    pen = ImageDraw.Draw(whole)
    top = picture.height + gap
    for x in range(picture.width):
        colour = colour_at(x / max(picture.width - 1, 1))
        red, green, blue = (round(_MIDDLE + opacity * (part - _MIDDLE)) for part in colour)
        pen.line((x, top, x, top + bar - 1), fill=(red, green, blue))
    font = ImageFont.load_default(12)
    pen.text((0, top + bar + 1), _shown(low), INK, font)
    pen.text((picture.width, top + bar + 1), _shown(high), INK, font, anchor="ra")
    return whole


def _shown(value: float) -> str:
    """Three digits, and zero without a sign."""
    return f"{value + 0.0:.3g}"


def _drawn(
    picture: Image.Image,
    scores: Sequence[float],
    low: float,
    high: float,
    grid: Grid,
    scale: int,
    opacity: float,
) -> Image.Image:
    patch = side_of_patch(picture, grid) * scale
    picture = enlarged(picture, scale)
    fill = [ABSENT if math.isnan(score) else colour_at(_part(score, low, high)) for score in scores]
    colours = spread(fill, grid, picture.size, patch)
    # Little contrast, or light and dark of the picture would be read as scores.
    faint = picture.convert("L").point(lambda value: _MIDDLE + (value - 128) * 2 // 5)
    shown = Image.blend(faint.convert("RGB"), colours, opacity)
    outside = spread([255] * len(fill), grid, picture.size, patch)
    blank = Image.new("RGB", picture.size, ABSENT)
    return Image.composite(shown, blank, outside)


def _part(score: float, low: float, high: float) -> float:
    """Where a score lies between the ends."""
    if high > low:
        return (score - low) / (high - low)
    return 0.5 if math.isfinite(score) else float(score > 0)
