"""Important tokens, then diverse ones among the rest: VisPruner."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import Budgeted
from ..errors import BudgetError
from ..fields import check_whole
from ..metric import cosine
from ..plan import Plan
from ..signals import Signals
from ..strategy import Reducer
from ..tokens import VisualTokens
from .kept_counts import column, features_of, first_of, kept_counts, marked_first, minus, ranked


@dataclass(frozen=True)
class ImportantDiverse(Budgeted, Reducer):
    """Keep the tokens with the highest scores, and the least similar ones of the rest.

    VisPruner (arXiv 2412.01818, version 2). A share of the budget goes to the highest scores. The
    others, in the order of their scores, are split into those at even and those at odd places;
    the `step` even ones that are most similar (cosine of features) to an odd one are dropped, what
    is left of the even ones, most similar first, is put before the odd ones, and so on until the
    budget is met. Which tokens stay depends on near ties in a way that no two precisions share.

    Protected tokens count as important.

    Args:
        keep: tokens that stay per row: int = count, float = fraction.
        per: what the budget is for (see `Keep`).
        important: the share of the budget, rounded down, that goes to the highest scores.
        step: how many tokens a round drops.
    """

    needs_scores: ClassVar[bool] = True
    exempt: ClassVar[Mapping[str, str]] = {
        "P8": "a part of the budget is for diversity, whatever the scores",
        "P12": "each budget thins out the rest anew",
    }

    important: float = 0.5
    step: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        share = self.important
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise BudgetError(f"important is a share in [0, 1], got {self.important!r}")
        check_whole("step", self.step, 1)

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        assert scores is not None, "Strategy checks that a scorer came before"
        counts = kept_counts(self.budget, tokens)
        if counts == tokens.lengths:
            return Plan.identity(tokens.mask, tokens.lengths)
        share = Decimal(repr(float(self.important)))
        important = [
            max(math.floor(share * count), protected)
            for count, protected in zip(counts, tokens.protected_lengths, strict=True)
        ]
        order = ranked(scores, tokens)
        rest = minus(tokens.lengths, important)
        place = torch.arange(max(rest), device=order.device) + column(important, order.device)
        queue = order.gather(1, place.clamp(max=order.shape[1] - 1))
        x = features_of(tokens)
        left = minus(counts, important)
        queue = _thin_out(queue, cosine(x, x), rest, left, self.step)
        number = torch.arange(queue.shape[1], device=order.device)
        seated = torch.where(number < column(left, order.device), queue, order.shape[1])
        keep = first_of(order, important)
        keep = torch.cat([keep, keep[:, :1]], dim=1).scatter_(1, seated, True)[:, :-1]
        return Plan.select(keep, counts)


def _thin_out(
    queue: Tensor, similar: Tensor, lengths: Sequence[int], left: Sequence[int], step: int
) -> Tensor:
    """`(batch, most left)` int64: what remains of the queues, packed to the left.

    Args:
        queue: `(batch, most)` int64 slots; row `b` has `lengths[b]` of them.
        similar: `(batch, tokens, tokens)` cosines.
        lengths: slots per queue.
        left: how many to leave of each.
        step: how many to drop at most in a round.
    """
    row = torch.arange(len(lengths), device=queue.device)[:, None, None]
    while any(n > u for n, u in zip(lengths, left, strict=True)):
        drops = [min(step, n - u, (n + 1) // 2) for n, u in zip(lengths, left, strict=True)]
        even, odd = queue[:, ::2], queue[:, 1::2]
        close = similar[row, even[:, :, None], odd[:, None, :]]
        length = column(lengths, queue.device)
        here = torch.arange(queue.shape[1], device=queue.device).expand_as(queue)
        real = here < length
        if min(lengths) < queue.shape[1]:
            close.masked_fill_(~real[:, None, 1::2], -2)
        best = close.amax(2) if odd.shape[1] else close.new_full(even.shape, -2)
        best = best.masked_fill(~real[:, ::2], -3)
        order = torch.argsort(best, dim=1, descending=True, stable=True)
        # A row that is done drops nothing; that its queue is shuffled does not change the set.
        number = torch.arange(even.shape[1], device=queue.device)
        stays = (number >= column(drops, queue.device)) & real[:, ::2].gather(1, order)
        merged = torch.cat([even.gather(1, order), odd], dim=1)
        alive = torch.cat([stays, real[:, 1::2]], dim=1)
        lengths = minus(lengths, drops)
        queue = merged.gather(1, marked_first(alive)[:, : max(lengths)])
    return queue
