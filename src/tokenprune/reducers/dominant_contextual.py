"""Dominant tokens, and the rest merged into a few contextual ones: VisionZip."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import Budgeted, Keep
from ..gather import gather_rows
from ..memberships import Memberships
from ..metric import cosine
from ..plan import Plan
from ..signals import Signal, Signals
from ..strategy import Reducer
from ..tokens import VisualTokens
from .kept_counts import (
    Metric,
    check_metric,
    column,
    first_of,
    kept_counts,
    marked_first,
    metric_of,
    metric_signals,
    minus,
    ranked,
)


@dataclass(frozen=True)
class DominantContextual(Budgeted, Reducer):
    """Keep the tokens with the highest scores; merge the rest into a few contextual ones.

    VisionZip (arXiv 2412.04467). Of the tokens that are not dominant, every n-th along the raster
    is a target, and each of the others merges into its most similar target (cosine of keys, head
    mean). A contextual token is the mean of its members, weighted by `sizes`. The released code
    adds the mean of the others to the target instead, which about doubles its length: say
    ``normalize=False`` for that.

    Protected tokens count as dominant. The order is that of the raster, with each contextual token
    at its smallest member; the released code puts contextual tokens last.

    Args:
        keep: tokens that stay per row, of both kinds: int = count, float = fraction.
        per: what the budget is for (see `Keep`).
        contextual: how many of them are contextual: int = count, float = fraction of `keep`. The
            paper's splits (54 + 10, 108 + 20, 162 + 30) all are 5 / 32.
        normalize: contextual tokens are means; False for target + mean of the others.
        metric: what similarity is measured on: ``"keys"`` (head mean), or ``"features"``.
        layer: the vision layer whose keys are read, Python style.
    """

    needs_scores: ClassVar[bool] = True

    contextual: int | float = 0.15625
    normalize: bool = True
    metric: Metric = "keys"
    layer: int = -2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_metric(self.metric, self.layer, type(self).layer)
        object.__setattr__(self, "contextual", Keep(self.contextual).amount)

    @property
    def ignores_scores(self) -> bool:
        """Whether all that stays is contextual, so that nothing is ranked."""
        share, keep = self.contextual, self.keep
        if isinstance(share, float):
            return share == 1
        return isinstance(keep, int) and share >= keep

    @property
    def signals(self) -> frozenset[Signal]:
        return metric_signals(self.metric, self.layer)

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        if scores is None:
            assert self.ignores_scores, "Strategy checks that a scorer came before"
            scores = torch.zeros(tokens.mask.shape, device=tokens.mask.device)
        counts = kept_counts(self.budget, tokens)
        if counts == tokens.lengths:
            return Plan.identity(tokens.mask, tokens.lengths)
        share = Keep(self.contextual)
        targets = [
            min(share.count(count), count - protected) if count < real else 0
            for count, protected, real in zip(
                counts, tokens.protected_lengths, tokens.lengths, strict=True
            )
        ]
        dominant = first_of(ranked(scores, tokens), minus(counts, targets))
        rest = tokens.mask & ~dominant
        lengths = minus(tokens.lengths, minus(counts, targets))
        stride = [max(n // max(c, 1), 1) for n, c in zip(lengths, targets, strict=True)]
        number = torch.arange(max(targets), device=rest.device)
        real_target = number < column(targets, rest.device)
        place = torch.where(real_target, number * column(stride, rest.device), 0)
        target = marked_first(rest).gather(1, place)
        slots = rest.shape[1]
        here = torch.arange(slots, device=rest.device).expand_as(rest)
        groups = torch.where(dominant, here, -1)
        is_target = torch.zeros_like(rest)
        if max(targets):
            x = metric_of(self.metric, self.layer, tokens, signals)
            similar = cosine(x, gather_rows(x, target))
            nearest = similar.masked_fill(~real_target[:, None, :], -2).argmax(2)
            spare = torch.cat([is_target, is_target[:, :1]], dim=1)
            spare.scatter_(1, torch.where(real_target, target, slots), True)
            is_target = spare[:, :slots]
            merged = torch.where(is_target, here, target.gather(1, nearest))
            merges = rest & (column(targets, rest.device) > 0)
            groups = torch.where(merges, merged, groups)
        plan = Plan.group(groups, tokens.sizes, counts)
        return plan if self.normalize else _added(plan, is_target)


def _added(plan: Plan, is_target: Tensor) -> Plan:
    """`plan` with every target's own weight 1, and its other members' adding up to 1."""
    assert plan.members is not None
    goals, kept = plan.members.goals, plan.anchors.shape[1]
    member = plan.members.shares > 0
    others = member & ~is_target
    # A dominant token is the only one of its group, no target, and comes out with a weight of 1.
    merging = Memberships(goals, others.float())
    share = 1 / merging.spread(merging.counts(kept)).clamp(min=1)
    members = Memberships(goals, torch.where(others, share, member.float()))
    return replace(plan, members=members)
