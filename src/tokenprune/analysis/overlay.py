"""Pictures of what a plan did: discarded patches are dark, merged ones share a colour.

Draw on the pixels that the model saw (`picture_of`), so that patches line up exactly with what the
image processor cropped. VTC-CLS (arXiv 2412.05819) shows such pictures in its figure 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from ..errors import ShapeError
from ..plan import Plan
from .canvas import (
    Colour,
    Grid,
    enlarged,
    laid_out,
    magnify,
    picture_of,
    side_of_patch,
    spread,
)
from .clusters import colours, label, outline
from .fate import DROPPED, Fate, Slots
from .sheet import side_by_side

__all__ = ["draw_fate", "magnify", "overlay", "overlay_crops", "picture_of", "side_by_side"]

DARK = 0.22
"""What is left of the brightness of a discarded patch."""

ABSENT = (128, 128, 128)
"""The colour of what is no token, although it is in a crop."""

TINT = 0.6
"""How much of a merged patch is the colour of its group; the rest is the picture in gray."""

ROOM = 8
"""Pixels that a patch must have a side for lines; twice as many for numbers."""


def overlay(
    picture: Image.Image, plan: Plan, grid: Grid, row: int = 0, scale: int = 1
) -> Image.Image:
    """`picture` with its discarded patches dark.

    Kept patches are copied bit for bit. Where tokens were merged, the patches of each group of two
    or more are gray pictures under one colour, and carry the group's number where there is room.

    Args:
        picture: what the model saw, see `picture_of`.
        plan: what became of its visual tokens, e.g. `attachment.last.plan`.
        grid: patches in height and width.
        row: row of the plan.
        scale: by how much to enlarge; lines and numbers stay sharp.

    Raises:
        ShapeError: the plan is not for that many patches, or has no such row.
    """
    high, wide = grid
    if plan.tokens != high * wide:
        raise ShapeError(
            f"a grid of {high} x {wide} has {high * wide} patches, but the plan is for "
            f"{plan.tokens} visual tokens"
        )
    return draw_fate([picture], Fate.of(plan, rows=(row,)), grid, scale=scale)


def overlay_crops(
    crops: Sequence[Image.Image],
    plan: Plan,
    patches: Tensor,
    grid: Grid,
    tiles: Grid,
    rows: Sequence[int] = (0,),
    scale: int = 1,
) -> Image.Image:
    """A picture of an any-resolution model: its base view, and beside it its tiles put together.

    As `overlay` draws them; patches that are no token at all, because unpadding cut them away, are
    gray. A group of merged patches has one colour and number in all crops.

    Args:
        crops: what the model saw: the base view, then the tiles by rows.
        plan: what became of the visual tokens.
        patches: `(batch, tokens)` int64, the crop times patches per crop plus patch of each slot
            of the plan: `Reduction.patches`.
        grid: patches in height and width of a crop.
        tiles: tiles in height and width.
        rows: the row of the plan that is the picture; where budgets are per crop, those of its
            crops in order.
        scale: by how much to enlarge; lines and numbers stay sharp.

    Raises:
        ShapeError: the crops are not as many as the tiles and the base view, or the plan is for
            other tokens.
    """
    fate = Fate.of(plan, patches, rows, len(crops), grid[0] * grid[1])
    return draw_fate(crops, fate, grid, tiles, scale)


def draw_fate(
    crops: Sequence[Image.Image],
    fate: Fate,
    grid: Grid,
    tiles: Grid | None = None,
    scale: int = 1,
) -> Image.Image:
    """The drawing itself, of what is already known patch by patch.

    Args:
        crops: what the model saw; one picture, or base view and tiles.
        fate: what became of their patches.
        grid: patches in height and width of a crop.
        tiles: tiles in height and width behind a base view; None for one picture alone, or for
            crops in their order.
        scale: by how much to enlarge.
    """
    tints = colours(fate, grid)
    drawn = [
        _drawn(crop, slots, tints, fate.groups, grid, scale)
        for crop, slots in zip(crops, fate.crops, strict=True)
    ]
    return laid_out(drawn, tiles, gap=6 * scale)


def _drawn(
    picture: Image.Image,
    slots: Slots,
    tints: Mapping[int, Colour],
    groups: Mapping[int, int],
    grid: Grid,
    scale: int,
) -> Image.Image:
    """One crop."""
    patch = side_of_patch(picture, grid) * scale
    picture = enlarged(picture, scale)

    def where(chosen: Sequence[bool]) -> Image.Image:
        return spread([255 * one for one in chosen], grid, picture.size, patch)

    shown = picture.point(lambda value: int(value * DARK))
    kept = where([slot is not None and slot != DROPPED for slot in slots])
    shown.paste(picture, mask=kept)
    if groups:
        black = (0, 0, 0)
        fill = [black if slot is None else tints.get(slot, black) for slot in slots]
        tint = spread(fill, grid, picture.size, patch)
        gray = ImageOps.autocontrast(picture.convert("L")).convert("RGB")
        shown.paste(Image.blend(gray, tint, TINT), mask=where([slot in groups for slot in slots]))
    if None in slots:
        shown.paste(ABSENT, mask=where([slot is None for slot in slots]))
    pen = ImageDraw.Draw(shown)
    if patch >= ROOM:
        outline(pen, slots, grid, patch)
    if patch >= 2 * ROOM:
        label(pen, slots, groups, grid, patch)
    return shown
