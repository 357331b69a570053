"""Eviction: keep the tokens with the highest scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import Budgeted
from ..plan import Plan
from ..signals import Signals
from ..strategy import Reducer
from ..tokens import VisualTokens


@dataclass(frozen=True)
class Evict(Budgeted, Reducer):
    """Keep the `keep` tokens with the highest scores, in raster order, bit for bit.

    Among equal scores the lowest index wins (a stable sort, unlike `torch.topk`), so the kept
    sets are nested in the budget. Protected tokens come first and count towards the budget; where
    there are more of them than the budget, all of them stay.

    Args:
        keep: tokens that stay per row: int = count, float = fraction.
        per: what the budget is for (see `Keep`).
    """

    needs_scores: ClassVar[bool] = True

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        assert scores is not None, "Strategy checks that a scorer came before"
        slots = tokens.mask.shape[1]
        counts = tuple(
            max(self.budget.count(real), protected)
            for real, protected in zip(tokens.lengths, tokens.protected_lengths, strict=True)
        )
        if counts == tokens.lengths:
            return Plan.identity(tokens.mask, tokens.lengths)
        order = torch.argsort(scores, dim=1, descending=True, stable=True)
        if any(tokens.protected_lengths):
            order = _first(order, tokens.protected)
        if any(real < slots for real in tokens.lengths):
            order = _first(order, tokens.mask)
        kept = max(counts)
        if min(counts) == kept:
            return Plan.of_indices(order[:, :kept].sort(dim=1).values, slots)
        count = torch.tensor(counts, device=order.device)[:, None]
        keep = torch.zeros_like(tokens.mask)
        keep.scatter_(1, order, torch.arange(slots, device=order.device) < count)
        return Plan.select(keep, counts)


def _first(order: Tensor, marked: Tensor) -> Tensor:
    """`order` with the marked slots moved to the front, else unchanged."""
    rank = marked.gather(1, order).logical_not().to(torch.uint8)
    return order.gather(1, torch.argsort(rank, dim=1, stable=True))
