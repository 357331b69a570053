"""A scorer and a reducer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune import Budgeted, Keys, Plan, Reducer, Scorer, Signal, Signals, VisualTokens


# --8<-- [start:scorer]
@dataclass(frozen=True)
class OutlierScorer(Scorer):
    """How far the keys of a token are from the mean key of its picture.

    Args:
        layer: block of the tower whose keys are read.
    """

    layer: int = -2

    def __post_init__(self) -> None:
        if isinstance(self.layer, bool) or not isinstance(self.layer, int):
            raise ValueError(f"layer must be the index of a block, got {self.layer!r}")

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset({Keys(self.layer)})

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        keys = signals[Keys(self.layer)].float().transpose(1, 2).flatten(2)
        keys = keys.masked_fill(~tokens.mask[:, :, None], 0)
        mean = keys.sum(1, keepdim=True) / tokens.mask.sum(1)[:, None, None]
        return (keys - mean).norm(dim=-1)
        # --8<-- [end:scorer]


# --8<-- [start:reducer]
@dataclass(frozen=True)
class FoldReducer(Budgeted, Reducer):
    """Keep the highest scores; every other token is merged into the kept one before it.

    Tokens before the first kept one are merged into that. Protected tokens stay alone.
    """

    needs_scores: ClassVar[bool] = True

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        assert scores is not None, "Strategy checks that a scorer came before"
        protected = tokens.protected & tokens.mask
        free = tokens.mask & ~protected
        # Protected first, then by score, padding last; stable, so that ties are decided.
        order = scores.masked_fill(~free, -torch.inf).argsort(dim=1, descending=True, stable=True)
        class_of = torch.where(protected, 0, torch.where(free, 1, 2)).gather(1, order)
        order = order.gather(1, class_of.argsort(dim=1, stable=True))
        counts = torch.tensor(
            [
                max(self.budget.count(real), fixed)
                for real, fixed in zip(tokens.lengths, tokens.protected_lengths, strict=True)
            ],
            device=scores.device,
        )
        slots = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
        kept = torch.zeros_like(tokens.mask).scatter(1, order, slots < counts[:, None])
        heads = kept & ~protected
        before = torch.where(heads, slots, -1).cummax(1).values
        first = torch.where(heads, slots, scores.shape[1]).amin(1, keepdim=True)
        into = torch.where(before < 0, first, before)
        into = into.masked_fill(into == scores.shape[1], -1)  # nothing but protected tokens stays
        groups = torch.where(protected, slots, into).masked_fill(~tokens.mask, -1)
        return Plan.group(groups, tokens.sizes)
        # --8<-- [end:reducer]
