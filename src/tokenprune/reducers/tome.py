"""Bipartite soft matching in halving rounds: ToMe on the output of a vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..budget import Budgeted
from ..gather import gather_rows
from ..metric import cosine, wide
from ..plan import Plan
from ..signals import Signal, Signals
from ..strategy import Reducer
from ..tokens import VisualTokens
from .kept_counts import (
    Free,
    Metric,
    check_metric,
    column,
    kept_counts,
    metric_of,
    metric_signals,
    minus,
)


@dataclass(frozen=True)
class ToMe(Budgeted, Reducer):
    """Merge the most similar tokens, pair by pair, until `keep` are left.

    ToMe (arXiv 2210.09461). Every round splits the tokens that are left, in raster order, into
    those at even and those at odd places; each even one finds its most similar odd one (cosine),
    and the most similar pairs merge. A round merges at most half, so any budget is reached, and
    the groups of a smaller budget are unions of those of a larger one. Merged tokens are means
    weighted by `sizes`, and stand at the place of their smallest member.

    Protected tokens take no part and count towards the budget; where they fill it, the other
    tokens are dropped.

    Args:
        keep: tokens that stay per row: int = count, float = fraction.
        per: what the budget is for (see `Keep`).
        metric: what similarity is measured on: ``"features"``, or ``"keys"`` (head mean).
        layer: the vision layer whose keys are read, Python style.
    """

    metric: Metric = "features"
    layer: int = -2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_metric(self.metric, self.layer, type(self).layer)

    @property
    def ignores_scores(self) -> bool:
        return True

    @property
    def signals(self) -> frozenset[Signal]:
        return metric_signals(self.metric, self.layer)

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        counts = kept_counts(self.budget, tokens)
        if counts == tokens.lengths:
            return Plan.identity(tokens.mask, tokens.lengths)
        free = Free.of(tokens)
        left = minus(counts, tokens.protected_lengths)
        slots = free.slots()
        metric = metric_of(self.metric, self.layer, tokens, signals)
        if slots.shape != tokens.mask.shape or free.lengths != (slots.shape[1],) * len(counts):
            metric = gather_rows(metric, slots)
        sizes = wide(tokens.sizes.gather(1, slots))
        merged = _halve(metric, sizes, slots, free.lengths, left)
        # Every token is a group of its own, or dropped, unless it was merged.
        here = torch.arange(tokens.mask.shape[1], device=slots.device).expand_as(tokens.mask)
        groups = torch.where(tokens.mask & tokens.protected, here, -1)
        took_part = torch.arange(slots.shape[1], device=slots.device) < column(
            [n if u else 0 for n, u in zip(free.lengths, left, strict=True)], slots.device
        )
        groups = groups.scatter(1, slots, torch.where(took_part, merged, groups.gather(1, slots)))
        return Plan.group(groups, tokens.sizes, counts)


def _halve(
    metric: Tensor, sizes: Tensor, slots: Tensor, lengths: Sequence[int], left: Sequence[int]
) -> Tensor:
    """`(batch, tokens)` int64: the smallest slot of the group in which each token ends.

    Args:
        metric: `(batch, tokens, channels)`; row `b` has `lengths[b]` tokens, packed to the left.
        sizes: `(batch, tokens)` float64, how many original tokens each one stands for.
        slots: `(batch, tokens)` int64, ascending in each row.
        lengths: tokens per row.
        left: groups to leave per row; 0 merges nothing.
    """
    device = slots.device
    beyond = int(torch.iinfo(slots.dtype).max)
    place = torch.arange(slots.shape[1], device=device).expand_as(slots)
    # From the second round on `metric` holds sums over members: sizes do not turn a direction.
    weight: Tensor | None = sizes
    while any(n > u > 0 for n, u in zip(lengths, left, strict=True)):
        merges = [min(n - u, n // 2) if u else 0 for n, u in zip(lengths, left, strict=True)]
        width = slots.shape[1]
        here = torch.arange(width, device=device).expand_as(slots)
        length = column(lengths, device)
        similar = cosine(metric[:, ::2], metric[:, 1::2])
        if min(lengths) < width:
            similar.masked_fill_((here >= length)[:, None, 1::2], -2)
        best, partner = similar.max(dim=2)
        if min(lengths) < width:
            best = best.masked_fill((here >= length)[:, ::2], -3)
        most = max(merges)
        chosen = torch.argsort(best, dim=1, descending=True, stable=True)[:, :most]
        merging = here[:, :most] < column(merges, device)
        source = 2 * chosen
        # Who does not merge becomes its own target, which changes nothing below.
        target = torch.where(merging, 2 * partner.gather(1, chosen) + 1, source)
        joined = here.scatter(1, source, target)
        first = slots.scatter_reduce(1, target, slots.gather(1, source), "amin")
        gone = (here != joined) | (here >= length)
        order = torch.argsort(first.masked_fill(gone, beyond), dim=1, stable=True)
        rank = torch.empty_like(order).scatter_(1, order, here)
        lengths = minus(lengths, merges)
        stay = order[:, : max(lengths)]
        last = stay.shape[1] - 1  # fillers of shorter rows may lie beyond
        place = rank.gather(1, joined.gather(1, place)).clamp(max=last)
        slots = first.gather(1, stay)
        if not any(n > u > 0 for n, u in zip(lengths, left, strict=True)):
            break
        moved, metric = wide(gather_rows(metric, source)), wide(gather_rows(metric, stay))
        if weight is not None:
            moved.mul_(weight.gather(1, source)[:, :, None])
            metric.mul_(weight.gather(1, stay)[:, :, None])
            weight = None
        if min(merges) < most:
            moved.mul_(merging[:, :, None])
        goal = rank.gather(1, target).clamp(max=last)
        row = torch.arange(len(lengths), device=device)[:, None] * stay.shape[1]
        metric.flatten(0, 1).index_add_(0, (goal + row).flatten(), moved.flatten(0, 1))
    return slots.gather(1, place)
