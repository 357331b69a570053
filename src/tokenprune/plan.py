"""`Plan`: what a reducer decides, as data.

A plan is a per-row linear map from token slots to kept slots. Reducers decide, applying is the
same for every method, and anything with a token axis can be put through it: features, hidden
states, position ids, masks, keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange, repeat
from torch import Tensor

from .errors import ShapeError
from .precision import full_precision


@dataclass(frozen=True, eq=False)
class Plan:
    """Which token slots stay, and what they are made of.

    Attributes:
        anchors: `(batch, kept)` int64, strictly increasing where `mask`: the slot from which each
            kept token takes its place (itself, or the smallest member of its group).
        mask: `(batch, kept)` bool, False where a row keeps fewer tokens than the longest one.
        tokens: slots per row of what the plan is applied to.
        weights: `(batch, kept, tokens)` float32, or None for a pure selection, which copies bits.
    """

    anchors: Tensor
    mask: Tensor
    tokens: int
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        if self.anchors.ndim != 2 or self.anchors.shape != self.mask.shape:
            raise ShapeError(
                f"anchors and mask must both have axes (batch kept), got "
                f"{tuple(self.anchors.shape)} and {tuple(self.mask.shape)}"
            )
        if self.anchors.dtype != torch.int64 or self.mask.dtype != torch.bool:
            raise ShapeError(
                f"anchors must be int64 and mask bool, got {self.anchors.dtype}, {self.mask.dtype}"
            )
        expected = (*self.anchors.shape, self.tokens)
        weights = self.weights
        if weights is not None and (weights.shape != expected or weights.dtype != torch.float32):
            raise ShapeError(
                f"weights must be float32 with axes (batch kept tokens) = {expected}, "
                f"got {weights.dtype} {tuple(weights.shape)}"
            )

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Kept tokens per row. One host sync, unless the constructor knew them."""
        return tuple(self.mask.sum(1).tolist())

    @classmethod
    def of_indices(cls, anchors: Tensor, tokens: int) -> Plan:
        """Keep the slots `anchors`, `(batch, kept)` int64, ascending: as many in every row."""
        plan = cls(anchors, torch.ones_like(anchors, dtype=torch.bool), tokens)
        plan.__dict__["lengths"] = (anchors.shape[1],) * anchors.shape[0]
        return plan

    @classmethod
    def identity(cls, mask: Tensor, lengths: tuple[int, ...] | None = None) -> Plan:
        """Keep every real token of rows with `(batch, tokens)` bool `mask`, all in their place."""
        return cls.select(mask, lengths)

    @classmethod
    def select(cls, keep: Tensor, lengths: tuple[int, ...] | None = None) -> Plan:
        """Keep the slots where `keep`, `(batch, tokens)` bool, is True, in their order.

        Args:
            keep: `(batch, tokens)` bool.
            lengths: kept tokens per row where the caller knows them; saves a host sync.

        >>> plan = Plan.select(torch.tensor([[True, False, True], [False, True, False]]))
        >>> plan.anchors, plan.mask
        (tensor([[0, 2],
                [1, 0]]), tensor([[ True,  True],
                [ True, False]]))
        """
        if keep.ndim != 2 or keep.dtype != torch.bool:
            raise ShapeError(
                f"keep must be bool with axes (batch tokens), got {keep.dtype} {tuple(keep.shape)}"
            )
        if lengths is None:
            lengths = tuple(keep.sum(1).tolist())
        kept = max(lengths, default=0)
        order = torch.argsort(keep.logical_not().to(torch.uint8), dim=1, stable=True)[:, :kept]
        mask = keep.gather(1, order)
        plan = cls(order.masked_fill(~mask, 0), mask, keep.shape[1])
        plan.__dict__["lengths"] = lengths
        return plan

    @classmethod
    def group(cls, groups: Tensor, sizes: Tensor, lengths: tuple[int, ...] | None = None) -> Plan:
        """Merge the tokens of each group into their size-weighted mean.

        Args:
            groups: `(batch, tokens)` int64 in [0, tokens): equal numbers are one group; -1 drops
                the token (padding). Which numbers are used does not matter.
            sizes: `(batch, tokens)` how many original tokens each slot stands for.
            lengths: groups per row where the caller knows them; saves a host sync.

        Returns:
            A plan whose outputs stand in the order of the smallest member of each group.
        """
        if groups.ndim != 2 or groups.dtype != torch.int64 or sizes.shape != groups.shape:
            raise ShapeError(
                "groups must be int64 and sizes numbers, both with axes (batch tokens), got "
                f"{groups.dtype} {tuple(groups.shape)} and {tuple(sizes.shape)}"
            )
        batch, tokens = groups.shape
        slots = torch.arange(tokens, device=groups.device)
        real = groups >= 0
        # The smallest member of each group is its anchor.
        first = torch.full((batch, tokens), tokens, dtype=torch.int64, device=groups.device)
        first.scatter_reduce_(
            1, groups.clamp(min=0), torch.where(real, slots, tokens), reduce="amin"
        )
        anchor_of = first.gather(1, groups.clamp(min=0))
        anchors = real & (anchor_of == slots)
        base = cls.select(anchors, lengths)
        kept = base.anchors.shape[1]
        # Which of the kept slots each token goes to; what is dropped goes to one more.
        number = (anchors.cumsum(1) - 1).gather(1, anchor_of.clamp(max=max(tokens - 1, 0)))
        goal = torch.where(real, number, kept)
        mass = torch.zeros(batch, kept + 1, tokens, device=groups.device)
        mass.scatter_(1, goal[:, None, :], sizes[:, None, :].to(torch.float32))
        mass = mass[:, :kept]
        weights = mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        plan = cls(base.anchors, base.mask, tokens, weights)
        plan.__dict__["lengths"] = base.lengths
        plan.__dict__["_goal"] = goal
        return plan

    @property
    def is_identity(self) -> bool:
        """Whether every slot stays in its place, unmerged (never where a row is padded)."""
        return self.weights is None and all(n == self.tokens for n in self.lengths)

    def __call__(self, x: Tensor) -> Tensor:
        """Put anything with axes `(batch, tokens, ...)` through the plan: `(batch, kept, ...)`.

        Selections copy bits. Merges accumulate in float32 (float64 for float64) and return the
        dtype of `x`; a kept token that is its own only member is copied. Bool and integer tensors
        are taken at the anchors. Slots where `mask` is False come out as zero.
        """
        expected = (self.anchors.shape[0], self.tokens)
        if x.shape[:2] != expected:
            raise ShapeError(
                f"x must have axes (batch tokens ...) = {expected} + (...), got {tuple(x.shape)}"
            )
        taken = self._take(x)
        if self.weights is None or not x.is_floating_point():
            return taken
        dtype = torch.promote_types(x.dtype, torch.float32)
        flat = x.flatten(2) if x.ndim > 2 else x[:, :, None]
        goal: Tensor | None = self.__dict__.get("_goal")
        if goal is not None and x.device.type == "cpu":
            mixed = _add_up(goal, self.weights, flat.to(dtype))
        else:
            mixed = _mix(self.weights.to(dtype), flat.to(dtype))
        mixed = mixed.to(x.dtype).reshape(taken.shape)
        own = self.weights.gather(2, self.anchors[:, :, None]).squeeze(2)
        alone = ((self.weights != 0).sum(-1) == 1) & (own == 1)
        copy = (alone | ~self.mask).reshape(*alone.shape, *(1,) * (taken.ndim - 2))
        return torch.where(copy, taken, mixed)

    def _take(self, x: Tensor) -> Tensor:
        batch, tokens = x.shape[:2]
        offset = torch.arange(batch, device=x.device)[:, None] * tokens
        taken = x.flatten(0, 1).index_select(0, (self.anchors + offset).flatten())
        taken = taken.reshape(*self.anchors.shape, *x.shape[2:])
        if all(length == self.anchors.shape[1] for length in self.lengths):
            return taken
        return taken.masked_fill(~self.mask.reshape(*self.mask.shape, *(1,) * (x.ndim - 2)), 0)

    def then(self, after: Plan) -> Plan:
        """This plan followed by `after`, which was made for what this one gives."""
        if after.tokens != self.anchors.shape[1]:
            raise ShapeError(
                f"the plan gives {self.anchors.shape[1]} slots, the next was made for "
                f"{after.tokens}"
            )
        weights = None
        if self.weights is not None or after.weights is not None:
            with full_precision(self.anchors.device):
                weights = torch.bmm(after.dense(), self.dense())
        plan = Plan(self.anchors.gather(1, after.anchors), after.mask, self.tokens, weights)
        plan.__dict__["lengths"] = after.lengths
        return plan

    def dense(self) -> Tensor:
        """The map as a matrix, `(batch, kept, tokens)` float32."""
        if self.weights is not None:
            return self.weights
        slots = torch.arange(self.tokens, device=self.anchors.device)
        chosen = (rearrange(self.anchors, "b k -> b k 1") == slots) & self.mask[:, :, None]
        return chosen.to(torch.float32)

    def source(self) -> Tensor:
        """Where each token went: `(batch, tokens)` int64 index of its kept slot, -1 = dropped.

        A token that several kept slots use (PruMerge) reports the one with the largest weight,
        and an anchor always reports its own.

        >>> Plan.select(torch.tensor([[True, False, True]])).source()
        tensor([[ 0, -1,  1]])
        """
        batch, kept = self.anchors.shape
        source = self.anchors.new_full((batch, self.tokens), -1)
        if kept == 0:
            return source
        if self.weights is not None:
            weight, slot = self.weights.max(1)
            source = torch.where(weight > 0, slot, source)
        numbers = repeat(torch.arange(kept, device=source.device), "k -> b k", b=batch)
        # Fillers write to a spare column, so that no real entry is overwritten.
        spare = torch.cat([source, source[:, :1]], dim=1)
        spare.scatter_(1, self.anchors.masked_fill(~self.mask, self.tokens), numbers)
        return spare[:, : self.tokens]


def _add_up(goal: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    """`_mix` where every token is in one group at most: each is looked at once.

    On a CPU alone, where the order of the sum is that of the tokens; a GPU adds in any order.

    Args:
        goal: `(batch, tokens)` int64, the group of each token; as many as there are for none.
        weights: `(batch, kept, tokens)`.
        x: `(batch, tokens, channels)`.
    """
    batch, kept = weights.shape[:2]
    if kept == 0:
        return x[:, :0]
    share = weights.gather(1, goal.clamp(max=kept - 1)[:, None, :]).squeeze(1).to(x.dtype)
    # Without weight a token must not reach its group: 0 * inf is NaN.
    row = torch.arange(batch, device=x.device)[:, None] * kept
    target = torch.where((goal < kept) & (share != 0), goal + row, batch * kept)
    summed = x.new_zeros(batch * kept + 1, x.shape[2])
    summed = summed.index_add(0, target.flatten(), (x * share[:, :, None]).flatten(0, 1))
    return summed[:-1].reshape(batch, kept, x.shape[2])


def _mix(weights: Tensor, x: Tensor) -> Tensor:
    """`weights @ x` over members alone: what has no weight in a group cannot reach it.

    Plain matrix products let inf and NaN through, because 0 * inf is NaN.
    """
    with full_precision(x.device):
        mixed = torch.bmm(weights, x)
        # The sum of what came out is cheap, and not finite if anything that went in was not.
        if bool(mixed.sum().isfinite()):
            return mixed
        mixed = torch.bmm(weights, x.where(x.isfinite(), 0))
        member = (weights != 0).to(x.dtype)
        for value in (torch.inf, -torch.inf, torch.nan):
            there = x.isnan() if value != value else x == value
            reached = torch.bmm(member, there.to(x.dtype)) > 0
            mixed = mixed + reached.to(x.dtype).masked_fill(reached, value)
        return mixed
