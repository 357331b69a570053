"""`Plan`: what a reducer decides, as data.

A plan is a per-row linear map from token slots to kept slots. Reducers decide, applying is the
same for every method, and anything with a token axis can be put through it: features, hidden
states, position ids, masks, keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .errors import PlanError, ShapeError
from .gather import gather_rows, zero_fillers
from .memberships import Memberships
from .to_device import numbers_on


@dataclass(frozen=True, eq=False)
class Plan:
    """Plan of a reduction: which token slots stay, and what they are made of.

    Attributes:
        anchors: `(batch, kept)` int64, strictly increasing where `mask`: the slot from which each
            kept token takes its patch (itself, or the smallest member of its group).
        mask: `(batch, kept)` bool, False where a row keeps fewer tokens than the longest one.
        tokens: number of slots per row of what the plan is applied to.
        members: what kept tokens are merged from, or None for a pure selection, which copies bits.
        lengths: number of kept tokens per row; counted, with one host sync, where it is not given.

    Raises:
        ShapeError: an axis, dtype or device is wrong.
        PlanError: anchors repeat, decrease or lie outside of the row, or members do. Looked at
            where it costs no host sync: on a CPU, outside of `torch.compile`.
    """

    anchors: Tensor
    mask: Tensor
    tokens: int
    members: Memberships | None = None
    lengths: tuple[int, ...] = ()

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
        free = self.anchors.device.type == "cpu" and not torch.compiler.is_compiling()
        if self.members is not None:
            self.members.check(len(self.anchors), self.tokens, self.anchors.shape[1], free)
        if len(self.lengths) != len(self.mask):
            object.__setattr__(self, "lengths", tuple(self.mask.sum(1).tolist()))
        if free:
            self._check_anchors()

    def _check_anchors(self) -> None:
        anchors, mask = self.anchors, self.mask
        outside = mask & ((anchors < 0) | (anchors >= self.tokens))
        if bool(outside.any()):
            raise PlanError(
                f"anchors must be slots in [0, {self.tokens}), got {anchors[outside].tolist()}: "
                f"no slot of {self.tokens}"
            )
        if bool((mask[:, 1:] & (anchors.diff() <= 0)).any()):
            raise PlanError(f"anchors must increase where mask is True, got {anchors.tolist()}")

    @classmethod
    def of_indices(cls, anchors: Tensor, tokens: int) -> Plan:
        """Keep the slots `anchors`, `(batch, kept)` int64, ascending: as many in every row."""
        mask = torch.ones_like(anchors, dtype=torch.bool)
        return cls(anchors, mask, tokens, lengths=(anchors.shape[-1],) * len(anchors))

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
        return cls(order.masked_fill(~mask, 0), mask, keep.shape[1], lengths=lengths)

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
        # Which of the kept tokens each slot goes to.
        number = (anchors.cumsum(1) - 1).gather(1, anchor_of.clamp(max=max(tokens - 1, 0)))
        goals, mass = torch.where(real, number, -1), sizes.to(torch.float32)
        each = Memberships(goals, mass)
        total = each.spread(each.sizes(mass, kept))
        shares = torch.where(real, mass / total.clamp(min=torch.finfo(torch.float32).tiny), 0)
        return cls(base.anchors, base.mask, tokens, Memberships(goals, shares), base.lengths)

    @classmethod
    def of_weights(cls, anchors: Tensor, mask: Tensor, weights: Tensor) -> Plan:
        """A plan from a matrix, for a merge that is easier to write so.

        Costs memory for kept x tokens numbers and a host sync; `group` costs neither.

        Args:
            anchors: anchors as in `Plan`.
            mask: mask as in `Plan`.
            weights: `(batch, kept, tokens)` float32, share of each slot in each kept token.

        >>> weights = torch.tensor([[[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]])
        >>> Plan.of_weights(torch.tensor([[0, 2]]), torch.tensor([[True, True]]), weights).source()
        tensor([[0, 0, 1]])
        """
        expected = anchors.shape
        if weights.ndim != 3 or weights.shape[:2] != expected or weights.dtype != torch.float32:
            raise ShapeError(
                f"weights must be float32 with axes (batch kept tokens) = {tuple(expected)} + "
                f"(tokens,), got {weights.dtype} {tuple(weights.shape)}"
            )
        return cls(anchors, mask, weights.shape[2], Memberships.of_weights(weights))

    @classmethod
    def concatenated(cls, plans: Sequence[Plan]) -> Plan:
        """One plan of the rows of all `plans`, for as many slots as the longest was made for."""
        tokens = max(plan.tokens for plan in plans)
        kept = max(plan.anchors.shape[1] for plan in plans)
        device = plans[0].mask.device

        def cat(tensors: Sequence[Tensor]) -> Tensor:
            return torch.cat([F.pad(x, (0, kept - x.shape[1])).to(device) for x in tensors])

        members = None
        if any(plan.members is not None for plan in plans):
            members = Memberships.concatenated([plan._memberships() for plan in plans])
        return cls(
            cat([plan.anchors for plan in plans]),
            cat([plan.mask for plan in plans]),
            tokens,
            members,
            tuple(length for plan in plans for length in plan.lengths),
        )

    @property
    def is_identity(self) -> bool:
        """Whether every slot stays as it is, unmerged (never where a row is padded)."""
        return self.members is None and all(n == self.tokens for n in self.lengths)

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
        members, kept = self.members, self.anchors.shape[1]
        if members is None or not x.is_floating_point():
            return taken
        dtype = torch.promote_types(x.dtype, torch.float32)
        flat = x.flatten(2) if x.ndim > 2 else x[:, :, None]
        mixed = members.add_up(flat.to(dtype), kept).to(x.dtype).reshape(taken.shape)
        alone = (self.counts() == 1) & (members.share_of(self.anchors) == 1)
        copy = (alone | ~self.mask).reshape(*alone.shape, *(1,) * (taken.ndim - 2))
        return torch.where(copy, taken, mixed)

    def _take(self, x: Tensor) -> Tensor:
        taken = gather_rows(x, self.anchors)
        if all(length == self.anchors.shape[1] for length in self.lengths):
            return taken
        return zero_fillers(taken, self.mask)

    def take_rows(self, rows: Sequence[int]) -> Plan:
        """The plan of some of its rows, in the order given."""
        which = numbers_on(self.mask.device, rows)
        return Plan(
            self.anchors.index_select(0, which),
            self.mask.index_select(0, which),
            self.tokens,
            None if self.members is None else self.members.take_rows(which),
            tuple(self.lengths[row] for row in rows),
        )

    def then(self, after: Plan) -> Plan:
        """This plan followed by `after`, which was made for what this one gives."""
        if after.tokens != self.anchors.shape[1]:
            raise ShapeError(
                f"the plan gives {self.anchors.shape[1]} slots, the next was made for "
                f"{after.tokens}"
            )
        members = after.members
        if self.members is not None and members is not None:
            members = self.members.then(members, after.tokens)
        elif members is not None:
            members = members.drawn(self.anchors, self.mask)
        elif self.members is not None:
            members = self.members.moved(after._numbers())
        anchors = self.anchors.gather(1, after.anchors)
        return Plan(anchors, after.mask, self.tokens, members, after.lengths)

    def dense(self) -> Tensor:
        """The map as a matrix, `(batch, kept, tokens)` float32: made when asked, and not kept."""
        if self.members is not None:
            return self.members.dense(self.tokens, self.anchors.shape[1])
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
        own = self._numbers()
        if self.members is None:
            return own
        return torch.where(own >= 0, own, self.members.owners(self.tokens))

    def counts(self) -> Tensor:
        """`(batch, kept)` int64, number of slots that each kept token is made of."""
        if self.members is None:
            return self.mask.to(torch.int64)
        return self.members.counts(self.anchors.shape[1])

    def _memberships(self) -> Memberships:
        """Those of a merge; of a selection, every token as its own only member."""
        if self.members is not None:
            return self.members
        own = self._numbers()
        return Memberships(own, (own >= 0).to(torch.float32))

    def _numbers(self) -> Tensor:
        """`(batch, tokens)` int64 number of the kept token that each slot anchors, or -1."""
        batch, kept = self.anchors.shape
        # Fillers write to a spare column, so that no real entry is overwritten.
        spare = self.anchors.new_full((batch, self.tokens + 1), -1)
        numbers = torch.arange(kept, device=spare.device).expand(batch, -1)
        spare.scatter_(1, self.anchors.masked_fill(~self.mask, self.tokens), numbers)
        return spare[:, : self.tokens]
