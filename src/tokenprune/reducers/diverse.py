"""Diverse tokens: greedy max-min distance, as in DivPrune."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..budget import Budgeted
from ..metric import cosine
from ..plan import Plan
from ..signals import Signal, Signals
from ..strategy import Reducer
from ..tokens import VisualTokens
from .kept_counts import Metric, check_metric, column, kept_counts, metric_of, metric_signals, minus


@dataclass(frozen=True)
class Diverse(Budgeted, Reducer):
    """Keep the tokens that are farthest from each other, bit for bit.

    DivPrune (arXiv 2503.02175). Greedy: first the token whose nearest neighbour is farthest away
    (cosine distance), then always the one farthest from what is kept. What is kept cannot be
    chosen again, unlike in the released code, which repeats tokens where features are equal. Ties
    go to the lowest index, and kept sets are nested in the budget. Protected tokens are kept from
    the start and count towards the budget.

    Args:
        keep: tokens that stay per row: int = count, float = fraction.
        per: what the budget is for (see `Keep`).
        metric: what distance is measured on: ``"features"``, or ``"keys"`` (head mean).
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
        x = metric_of(self.metric, self.layer, tokens, signals)
        distance = 1 - cosine(x, x)
        kept = tokens.protected & tokens.mask
        closed = kept | ~tokens.mask
        nearest = distance.masked_fill(~kept[:, None, :], torch.inf).amin(2)
        alone = distance.masked_fill(~tokens.mask[:, None, :], torch.inf)
        alone.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        farthest = torch.where(kept.any(1, keepdim=True), nearest, alone.amin(2))
        flat = distance.flatten(0, 1)
        row = torch.arange(len(counts), device=kept.device)[:, None] * kept.shape[1]
        open_seats = minus(counts, tokens.protected_lengths)
        picks = []
        for _ in range(max(open_seats)):
            pick = farthest.masked_fill(closed, -torch.inf).argmax(1, keepdim=True)
            picks.append(pick)
            closed = closed.scatter(1, pick, True)
            beside = flat.index_select(0, (pick + row).flatten())
            farthest = nearest = torch.minimum(nearest, beside)
        # Rows with fewer seats put the picks that they have no seat for into a spare column.
        picked = torch.cat(picks, dim=1) if picks else row[:, :0]
        number = torch.arange(picked.shape[1], device=kept.device)
        seated = torch.where(number < column(open_seats, kept.device), picked, kept.shape[1])
        chosen = torch.cat([kept, kept[:, :1]], dim=1).scatter_(1, seated, True)
        return Plan.select(chosen[:, :-1], counts)
