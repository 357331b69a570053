"""Reductions of one call put together: one row for each picture, in the order of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from .kept_patches import Kept, Origin
from .plan import Plan
from .strategy import Reduction
from .to_device import numbers_on
from .tokens import VisualTokens


@dataclass(frozen=True, eq=False)
class Part:
    """A reduction of a call, with what its rows show.

    Attributes:
        reduction: what a strategy did.
        origins: what each row shows; None for a row that is a copy of another one.
    """

    reduction: Reduction
    origins: tuple[Origin | None, ...]


def kept_of(parts: Sequence[Part]) -> tuple[Kept, ...]:
    """What is left of each picture and video of a call: pictures first, then videos."""
    found: dict[tuple[bool, int], Kept] = {}
    for part in parts:
        tokens = part.reduction.tokens
        rows = zip(part.origins, tokens.patches.tolist(), tokens.mask.tolist(), strict=True)
        for origin, patches, mask in rows:
            if origin is None:
                continue
            left = (n for n, real in zip(patches, mask, strict=True) if real)
            kept = Kept.at(origin, left)
            earlier = found.get(origin.order)
            found[origin.order] = kept if earlier is None else earlier + kept
    return tuple(found[order] for order in sorted(found))


def joined(parts: Sequence[Part]) -> Reduction:
    """One reduction of all parts of a call, without copies, its rows in the order of `kept_of`."""
    whole = parts[0].reduction
    if len(parts) > 1:
        whole = _concatenated([part.reduction for part in parts])
    rows = [
        (origin, row)
        for row, origin in enumerate(origin for part in parts for origin in part.origins)
        if origin is not None
    ]
    rows.sort(key=lambda pair: (pair[0].order, pair[0].crop))
    which = [row for _, row in rows]
    if which != list(range(whole.plan.anchors.shape[0])):
        whole = _taken(whole, which)
    return replace(whole, origins=tuple(origin for origin, _ in rows))


def _taken(reduction: Reduction, rows: list[int]) -> Reduction:
    """Some rows of a reduction."""
    tokens, plan = reduction.tokens, reduction.plan
    which = numbers_on(plan.mask.device, rows)

    def take(x: Tensor) -> Tensor:
        return x.index_select(0, which)

    fields = ("features", "mask", "patches", "sizes", "protected", "ids")
    return Reduction(
        VisualTokens(*(take(getattr(tokens, name)) for name in fields)),
        plan.take_rows(rows),
        None if reduction.scores is None else take(reduction.scores),
        None if reduction.patches is None else take(reduction.patches),
    )


def _concatenated(reductions: Sequence[Reduction]) -> Reduction:
    """All rows of several reductions, padded to the longest."""
    slots = max(each.plan.tokens for each in reductions)
    kept = max(each.plan.anchors.shape[1] for each in reductions)
    device = reductions[0].plan.mask.device

    def cat(tensors: Sequence[Tensor], length: int, value: float = 0) -> Tensor:
        """Along the first axis, the second padded to `length`."""
        padded = [
            pad(x, (*(0, 0) * (x.ndim - 2), 0, length - x.shape[1]), value=value) for x in tensors
        ]
        return torch.cat([x.to(device) for x in padded])

    tokens = [each.tokens for each in reductions]
    fields = ("features", "mask", "patches", "sizes", "protected")
    columns = [cat([getattr(each, name) for each in tokens], kept) for name in fields]
    columns.append(torch.cat([each.ids.to(device) for each in tokens]))
    scores = [each.scores for each in reductions if each.scores is not None]
    patches = [each.patches for each in reductions if each.patches is not None]
    return Reduction(
        VisualTokens(*columns),
        Plan.concatenated([each.plan for each in reductions]),
        cat(scores, slots) if len(scores) == len(reductions) else None,
        cat(patches, slots, -1) if len(patches) == len(reductions) else None,
    )
