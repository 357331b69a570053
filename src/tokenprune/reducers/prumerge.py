"""Outlying attention kept, the rest merged into it: LLaVA-PruMerge and PruMerge+."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from einops import rearrange, reduce
from torch import Tensor

from ..budget import Budgeted, Keep, KeepLike
from ..errors import BudgetError
from ..fields import check_choice, check_whole
from ..memberships import Memberships
from ..metric import cosine_to_all, wide
from ..plan import Plan
from ..signals import ClsAttention, JointClsAttention, Keys, Signal, Signals
from ..strategy import Reducer
from ..tokens import VisualTokens
from .kept_counts import Free, column, first_of, kept_counts, marked_first, minus

Heads: TypeAlias = Literal["joint", "mean"]
"""How the heads of an attention row become one: as one head over all channels, or their mean."""


@dataclass(frozen=True)
class _Merging(Budgeted):
    """Mixin with the fields that both variants share.

    Args:
        keep: None keeps as many as there are outliers, so the count depends on the picture; a
            budget (int = count, float = fraction) is met exactly, the extra token included.
        per: what the budget is for (see `Keep`).
        layer: the vision layer whose [CLS] attention and keys are read; -1, the last, as released.
        heads: ``"joint"`` for the released attention, one head over all channels; ``"mean"`` for
            the mean of the model's own heads.
        neighbours: how many of the most similar tokens merge into each kept one.
        normalize: merged tokens are weighted means. False, as released: a kept token counts in
            full, with others added by their attention, and the extra token is a plain sum.
    """

    exempt: ClassVar[Mapping[str, str]] = {
        "P6": "a token may merge into several others, or into none",
        "P7": "an extra token of one member is that token times its attention",
        "P10": "the paper's weights do not sum to one",
    }

    keep: KeepLike | None = None  # type: ignore[assignment]  # the picture decides
    layer: int = -1
    heads: Heads = "joint"
    neighbours: int = 32
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.keep is None:
            Keep(1.0, self.per)  # checks per
        else:
            super().__post_init__()
            if self.keep == 0:
                raise BudgetError("keep must be at least 1: merging always leaves the extra token")
        check_choice("heads", self.heads, get_args(Heads))
        check_whole("neighbours", self.neighbours, 0)

    @property
    def ignores_scores(self) -> bool:
        return True

    @property
    def signals(self) -> frozenset[Signal]:
        """[CLS] attention and keys of one layer."""
        return frozenset({self._row, Keys(self.layer)})

    @property
    def _row(self) -> Signal:
        layers = (self.layer,)
        return JointClsAttention(layers) if self.heads == "joint" else ClsAttention(layers)

    def seats(self, tokens: VisualTokens) -> tuple[int, ...] | None:
        """Tokens that stay per row, or None where the picture decides."""
        if self.keep is None:
            return None
        assert not isinstance(self.keep, Keep)
        return kept_counts(Keep(self.keep, self.per), tokens)

    def attention(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        """`(batch, tokens)` float32 > 0 on free tokens, 0 elsewhere."""
        attention = signals[self._row][:, 0].float()
        free = tokens.mask & ~tokens.protected
        if self.heads == "mean":
            attention = reduce(attention, "batch heads tokens -> batch tokens", "mean")
        # Attention may underflow; who is merged must not depend on that.
        tiny = torch.finfo(torch.float32).tiny
        return torch.where(free, attention.clamp(min=tiny), 0)


@dataclass(frozen=True)
class PruMerge(_Merging, Reducer):
    """Keep the tokens with outlying [CLS] attention; merge the others into them.

    LLaVA-PruMerge (arXiv 2403.15388). A token stays if its attention exceeds the third quartile by
    more than 1.5 interquartile ranges. To each are added its nearest tokens (cosine of keys over
    all heads), weighted by their attention, and one extra token holds all that did not stay.
    Tokens merge as they were, and into several others. Rows of weights do not sum to one, unless
    `normalize` says so. Protected tokens stay as they are and take no part.

    The order is that of the raster, the extra token at its smallest member; the released code
    sorts by attention and puts the extra token last.

    Args:
        keep: None for as many as there are outliers, plus the extra token; or an exact budget: the
            `keep` - 1 tokens with the highest attention, plus the extra token.
        per: what the budget is for (see `Keep`).
        layer: the vision layer whose [CLS] attention and keys are read.
        heads: ``"joint"`` as released, or ``"mean"`` of the model's own heads.
        neighbours: how many of the most similar tokens merge into each kept one.
        normalize: merged tokens are weighted means.
    """

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        seats = self.seats(tokens)
        if seats is not None and seats == tokens.lengths:
            return Plan.identity(tokens.mask, tokens.lengths)
        attention = self.attention(tokens, signals)
        free = Free.of(tokens)
        if seats is None:
            kept = _outliers(attention, free)
        else:
            kept = first_of(_by_attention(attention, free), _heads_of(seats, tokens))
        return _merge(self, tokens, signals, attention, kept, seats)


@dataclass(frozen=True)
class PruMergePlus(_Merging, Reducer):
    """PruMerge, with tokens sampled evenly over the picture kept as well.

    PruMerge+ (arXiv 2403.15388). With n outliers of N tokens, every (N // n) // 3-th token of the
    raster stays too. Everything else is as in `PruMerge`.

    Args:
        keep: None for outliers, samples and the extra token; or an exact budget: of `keep` - 1
            tokens a quarter, rounded up, has the highest attention, and the others are spread
            evenly over the rest (one outlier to three samples, as the rule above gives).
        per: what the budget is for (see `Keep`).
        layer: the vision layer whose [CLS] attention and keys are read.
        heads: ``"joint"`` as released, or ``"mean"`` of the model's own heads.
        neighbours: how many of the most similar tokens merge into each kept one.
        normalize: merged tokens are weighted means.
    """

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        seats = self.seats(tokens)
        if seats is not None and seats == tokens.lengths:
            return Plan.identity(tokens.mask, tokens.lengths)
        attention = self.attention(tokens, signals)
        free = Free.of(tokens)
        if seats is None:
            kept = _outliers(attention, free)
            length = column(free.lengths, kept.device)
            outliers = kept.sum(1, keepdim=True).clamp(min=1)
            step = length.div(outliers, rounding_mode="floor").div(3, rounding_mode="floor")
            place = free.mask.cumsum(1) - 1
            kept = kept | (free.mask & (place % step.clamp(min=1) == 0))
        else:
            chosen = _heads_of(seats, tokens)
            top = [-(-count // 4) for count in chosen]
            kept = first_of(_by_attention(attention, free), top)
            left = minus(free.lengths, top)
            samples = minus(chosen, top)
            kept = kept | _spread(free.mask & ~kept, left, samples)
        return _merge(self, tokens, signals, attention, kept, seats)


def _outliers(attention: Tensor, free: Free) -> Tensor:
    """`(batch, tokens)` bool: above the third quartile by more than 1.5 interquartile ranges."""
    sorted_ = wide(attention.masked_fill(~free.mask, torch.inf).sort(dim=1).values)

    def quantile(numerator: int) -> Tensor:
        """Linear interpolation between order statistics, at `numerator` quarters."""
        steps = [max(n - 1, 0) * numerator for n in free.lengths]
        below = column([s // 4 for s in steps], attention.device)
        part = column([s % 4 for s in steps], attention.device) / 4
        last = column([max(n - 1, 0) for n in free.lengths], attention.device)
        low, high = (sorted_.gather(1, i) for i in (below, torch.minimum(below + 1, last)))
        return low + (high - low) * part

    first, third = quantile(1), quantile(3)
    return free.mask & (wide(attention) > third + 1.5 * (third - first))


def _by_attention(attention: Tensor, free: Free) -> Tensor:
    """`(batch, tokens)` int64: free slots, highest attention first, then the others."""
    ranks = attention.masked_fill(~free.mask, -1)
    return torch.argsort(ranks, dim=1, descending=True, stable=True)


def _heads_of(seats: Sequence[int], tokens: VisualTokens) -> list[int]:
    """Seats for free tokens alone: one is the extra token's, unless there is no need for one."""
    return [
        seat - protected - (protected < seat < real)
        for seat, real, protected in zip(
            seats, tokens.lengths, tokens.protected_lengths, strict=True
        )
    ]


def _spread(rest: Tensor, lengths: Sequence[int], samples: Sequence[int]) -> Tensor:
    """`(batch, tokens)` bool: so many samples of the slots where `rest`, evenly along them."""
    order = marked_first(rest)
    most = max(samples)
    number = torch.arange(most, device=rest.device)
    count = column(samples, rest.device)
    place = (number * column(lengths, rest.device)).div(count.clamp(min=1), rounding_mode="floor")
    slots = order.gather(1, place.clamp(max=rest.shape[1] - 1))
    slots = torch.where(number < count, slots, rest.shape[1])
    chosen = torch.zeros(rest.shape[0], rest.shape[1] + 1, dtype=torch.bool, device=rest.device)
    return chosen.scatter_(1, slots, True)[:, :-1]


def _merge(
    config: _Merging,
    tokens: VisualTokens,
    signals: Signals,
    attention: Tensor,
    kept: Tensor,
    seats: tuple[int, ...] | None,
) -> Plan:
    """The plan that keeps `kept` and the protected tokens, with the others merged."""
    slots = kept.shape[1]
    protected = tokens.protected & tokens.mask
    free = tokens.mask & ~protected
    lost = free & ~kept
    merging = torch.ones_like(kept[:, :1])
    if seats is not None:
        # Protected tokens may take every seat, the extra token's too; a full row stays as it is.
        taken = [p >= seat for p, seat in zip(tokens.protected_lengths, seats, strict=True)]
        lost = lost & (column([int(each) for each in taken], kept.device) == 0)
        merging = column(seats, kept.device) < column(tokens.lengths, kept.device)
    here = torch.arange(slots, device=kept.device).expand_as(kept)
    # The extra token stands where the first of its members stood.
    extra = here.masked_fill(~lost, slots).amin(1, keepdim=True)
    plan = Plan.select(protected | kept | (here == extra), seats)
    is_extra = (plan.anchors == extra) & plan.mask
    merging = kept.gather(1, plan.anchors) & plan.mask & merging
    keys = rearrange(
        signals[Keys(config.layer)], "batch heads tokens channels -> batch tokens (heads channels)"
    )
    if any(real < slots for real in tokens.lengths):
        keys = torch.where(tokens.mask[:, :, None], keys, 0)
    near = min(config.neighbours, max(slots - 1, 0))
    similar = cosine_to_all(keys, plan.anchors)
    similar.masked_fill_(~(free[:, None, :] & merging[:, :, None]), -2)
    similar.scatter_(2, plan.anchors[:, :, None], -2)
    index = _nearest(similar, near)
    valid = similar.gather(2, index) > -2
    # A kept token is itself and its neighbours; the extra token is all that did not stay.
    batch, kept_slots = plan.anchors.shape
    number = torch.arange(kept_slots, device=kept.device).expand(batch, -1)
    goals = number.masked_fill(~plan.mask | is_extra, -1)
    near_goals = goals[:, :, None].expand_as(index).masked_fill(~valid, -1).flatten(1)
    of_extra = torch.where(is_extra, number, -1).amax(1, keepdim=True).expand_as(lost)
    index = index.flatten(1)
    members = Memberships(
        torch.cat([goals, near_goals, of_extra.masked_fill(~lost, -1)], dim=1),
        torch.cat([torch.ones_like(goals).float(), attention.gather(1, index), attention], dim=1),
        torch.cat([plan.anchors, index, here], dim=1),
    )
    if config.normalize:
        members = _normalized(members, kept_slots)
    return replace(plan, members=members)


def _normalized(members: Memberships, kept: int) -> Memberships:
    """The same with the shares of every kept token adding up to one."""
    ones = wide(torch.ones_like(members.shares))[:, :, None]
    whole = Memberships(members.goals, members.shares)
    total = whole.add_up(ones, kept).squeeze(2).clamp(min=torch.finfo(torch.float32).tiny)
    share = wide(members.shares) / members.spread(total)
    return replace(members, shares=share.float())


def _nearest(similar: Tensor, count: int) -> Tensor:
    """`(batch, kept, count)` int64: the most similar tokens, lowest index first among equals."""
    # Cosines are multiples of 2^-24, so a place below that makes every one of them unique.
    slots = similar.shape[2]
    place = wide(torch.arange(slots, device=similar.device)) / slots
    return (wide(similar) * 2**24).sub_(place).topk(count, dim=2, sorted=False).indices
