"""Rows: which slots of encoded pictures share a budget, and which patches they are of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.budget import Per
from tokenprune.errors import UnsupportedError
from tokenprune.kept_patches import Origin

from ..kit.budget_rows import BudgetRows
from .family import Encoded, Sight


@dataclass(frozen=True, eq=False)
class PictureRow:
    """What shares a budget: a picture or video, or a crop or frame of one.

    Attributes:
        slots: `(slots,)` int64 on the CPU, which of all slots of a call they are.
        patches: `(slots,)` int64 on the CPU, the patch that each is, counted over the row; -1 for
            none.
        origin: what the row shows.
    """

    slots: Tensor
    patches: Tensor
    origin: Origin

    @property
    def tokens(self) -> Tensor:
        """`(patches,)` int64, the slots that hold a patch."""
        return self.slots[self.patches >= 0]


def divides(sight: Sight, per: Per) -> bool:
    """Whether budgets are for crops or frames of what `sight` brings."""
    parts = {"image": ("crop",), "video": ("crop", "frame")}
    return sight.crops is not None and per in parts[sight.kind]


def rows_of(
    sight: Sight,
    encoded: Encoded,
    patches: Sequence[Tensor],
    crops: Sequence[int] | None,
) -> list[PictureRow]:
    """The rows of what was encoded.

    Args:
        sight: the kind of picture.
        encoded: how they were encoded.
        patches: the patch that each slot of each picture is, see `Sight.patches`.
        crops: crops or frames of each, see `Sight.crops`.
    """
    counts: Sequence[int | None] = [None] * len(patches) if crops is None else crops
    divided, first = divides(sight, encoded.per), 0
    rows: list[PictureRow] = []
    for number, (patch, count) in enumerate(zip(patches, counts, strict=True)):
        size = None if count is None else _size(sight, encoded, patch, count)
        origin = Origin(number, sight.kind, patches_per_crop=size)
        row = PictureRow(torch.arange(first, first + len(patch), device="cpu"), patch, origin)
        rows += _crops(row, count) if divided else [row]
        first += len(patch)
    return rows


def _size(sight: Sight, encoded: Encoded, patch: Tensor, crops: int) -> int:
    """Number of patches of a crop."""
    return int((patch >= 0).sum()) // crops if sight.crop is None else sight.crop(encoded)


def _crops(row: PictureRow, count: int | None) -> Iterator[PictureRow]:
    """The crops or frames of a row; slots without a patch stay with the frame before them."""
    size, shown = row.origin.patches_per_crop, row.origin
    if size is None or count is None:
        raise UnsupportedError(
            "per='frame' needs the pixels of a video: it is not known how many frames its "
            "features have"
        )
    crop = torch.where(row.patches >= 0, row.patches // size, -1)
    if shown.kind == "video":
        crop = crop.cummax(0).values.clamp(min=0)
    for number in range(count):
        mine = crop == number
        patches = row.patches[mine]
        inside = torch.where(patches >= 0, patches % size, -1)
        yield PictureRow(row.slots[mine], inside, Origin(shown.number, shown.kind, crop=number))


def before_projector(sight: Sight, encoded: Encoded) -> BudgetRows | None:
    """The rows of what enters the projector crop by crop; None where each crop is a row."""
    if sight.crops is None:
        return None
    patches, crops = sight.told(encoded), sight.crops(encoded)
    assert patches is not None
    assert crops is not None
    assert sight.crop is not None
    size = sight.crop(encoded)
    firsts = list(itertools.accumulate(crops, initial=0))
    rows = rows_of(sight, encoded, patches, crops)
    numbers = [
        row.patches[row.patches >= 0] + (firsts[row.origin.number] + row.origin.crop) * size
        for row in rows
    ]
    origins = tuple(row.origin for row in rows)
    beside = 0 if sight.beside is None else sight.beside(encoded.core)
    if len(rows) == sum(crops) and all(len(each) == size for each in numbers):
        return BudgetRows(torch.stack(numbers), None, size, origins, beside)
    return BudgetRows.of(numbers, size, origins, beside)
