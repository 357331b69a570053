"""Eviction: keep the tokens with the highest scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..budget import Budgeted
from ..plan import Plan
from ..signals import Signals
from ..strategy import Reducer
from ..tokens import VisualTokens
from .kept_counts import first_of, kept_counts, ranked


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
    keeps_highest: ClassVar[bool] = True

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        assert scores is not None, "Strategy checks that a scorer came before"
        counts = kept_counts(self.budget, tokens)
        if counts == tokens.lengths:
            return Plan.identity(tokens.mask, tokens.lengths)
        order = ranked(scores, tokens)
        kept = max(counts)
        if min(counts) == kept:
            return Plan.of_indices(order[:, :kept].sort(dim=1).values, order.shape[1])
        return Plan.select(first_of(order, counts), counts)
