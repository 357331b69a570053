"""Fate of every patch of a picture, crop by crop: kept, merged or dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ..errors import ShapeError
from ..plan import Plan

DROPPED = -1

Slots = tuple[int | None, ...]
"""For each patch of a crop the number of the kept token that it is part of; `DROPPED` where it was
discarded, None where it never was a token (an any-resolution model cuts such padding away)."""


@dataclass(frozen=True)
class Fate:
    """Kept token that each patch of a picture went to.

    Attributes:
        crops: one entry for each crop; a picture that is not cut has one.
    """

    crops: tuple[Slots, ...]

    @classmethod
    def of(
        cls,
        plan: Plan,
        patches: Tensor | None = None,
        rows: Sequence[int] = (0,),
        crops: int = 1,
        per_crop: int | None = None,
    ) -> Fate:
        """Read from a plan.

        Args:
            plan: what was decided.
            patches: `(batch, tokens)` int64, the crop times patches per crop plus patch of each
                slot, -1 for padding, as in `Reduction.patches`; None where slots are the patches
                of one crop in raster order.
            rows: the row of the plan that is the picture; where budgets are per crop, those of its
                crops in order.
            crops: number of crops of the picture.
            per_crop: number of patches of a crop; None for as many as the plan has slots.

        Raises:
            ShapeError: rows or patches do not fit the plan.
        """
        batch, kept = plan.anchors.shape
        per_crop = plan.tokens if per_crop is None else per_crop
        if not all(0 <= row < batch for row in rows) or len(rows) not in (1, crops):
            wanted = ", ".join(map(str, rows))
            raise ShapeError(
                f"row must be in [0, {batch}), one for a picture or for each of its {crops} crops, "
                f"got {wanted or 'none'}"
            )
        if patches is None:
            patches = plan.anchors.new_tensor(range(plan.tokens)).expand(batch, -1)
        inside = per_crop * (crops if len(rows) == 1 else 1)
        largest = int(patches[list(rows)].max()) if patches.numel() else 0
        if tuple(patches.shape) != (batch, plan.tokens) or largest >= inside:
            raise ShapeError(
                f"patches must have axes (batch tokens) = {(batch, plan.tokens)} and be below "
                f"{inside}, got {tuple(patches.shape)} up to {largest}"
            )
        of_patch: list[int | None] = [None] * (per_crop * crops)
        source = plan.source()
        for number, row in enumerate(rows):
            first = number * per_crop
            for patch, goal in zip(patches[row].tolist(), source[row].tolist(), strict=True):
                if patch >= 0:
                    of_patch[first + patch] = goal + number * kept if goal >= 0 else DROPPED
        return cls(
            tuple(tuple(of_patch[n * per_crop : (n + 1) * per_crop]) for n in range(crops)),
        )

    @cached_property
    def groups(self) -> dict[int, int]:
        """Kept tokens that several patches are part of, numbered from 1 in their order."""
        members = Counter(slot for crop in self.crops for slot in crop if slot is not None)
        del members[DROPPED]
        merged = sorted(slot for slot, count in members.items() if count > 1)
        return {slot: number for number, slot in enumerate(merged, start=1)}
