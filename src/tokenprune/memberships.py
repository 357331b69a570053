"""Memberships of merged tokens: which slots each kept token is made of, without a matrix.

A matrix of kept tokens by slots is almost empty. What is in it are entries: a slot, the kept token
that it is part of, and its share. Where every slot is part of one kept token at most, as in ToMe or
KMeans, these are two vectors per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import PlanError, ShapeError


@dataclass(frozen=True, eq=False)
class Memberships:
    """Entries of a merge, as many in every row.

    Attributes:
        goals: `(batch, entries)` int64, number of the kept token that an entry is part of, or -1.
        shares: `(batch, entries)` float32, weight of the slot in that token; 0 is no part of it.
        slots: `(batch, entries)` int64, slot that goes in; None: entry n is slot n.
    """

    goals: Tensor
    shares: Tensor
    slots: Tensor | None = None

    @classmethod
    def of_weights(cls, weights: Tensor) -> Memberships:
        """Entries of a matrix, `(batch, kept, tokens)`; as many as its fullest row has."""
        flat = weights.flatten(1)
        there = flat != 0
        most = int(there.sum(1).max()) if there.numel() else 0
        cell = there.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        tokens = max(weights.shape[2], 1)
        return cls(cell // tokens, flat.gather(1, cell), cell % tokens)

    @classmethod
    def concatenated(cls, parts: Sequence[Memberships]) -> Memberships:
        """Rows of all `parts`, padded to the most entries."""
        most = max(part.goals.shape[1] for part in parts)
        device = parts[0].goals.device

        def cat(tensors: Sequence[Tensor], filler: int) -> Tensor:
            padded = [F.pad(x, (0, most - x.shape[1]), value=filler) for x in tensors]
            return torch.cat([x.to(device) for x in padded])

        plain = all(part.slots is None for part in parts)
        return cls(
            cat([part.goals for part in parts], -1),
            cat([part.shares for part in parts], 0),
            None if plain else cat([part._slots() for part in parts], 0),
        )

    def check(self, batch: int, tokens: int, kept: int, values: bool) -> None:
        """Refuse entries that do not fit a plan.

        Raises:
            ShapeError: an axis or dtype is wrong.
            PlanError: where `values` is set: a slot or kept token is named that is not there.
        """
        entries = tokens if self.slots is None else self.goals.shape[-1]
        kinds = {"goals": torch.int64, "shares": torch.float32, "slots": torch.int64}
        for name, dtype in kinds.items():
            x: Tensor | None = getattr(self, name)
            if x is not None and (x.shape != (batch, entries) or x.dtype != dtype):
                raise ShapeError(
                    f"{name} must be {dtype} with axes (batch entries) = {(batch, entries)}, got "
                    f"{x.dtype} {tuple(x.shape)}"
                )
        if not values:
            return
        for numbers, first, end, what in (
            (self.goals, -1, kept, "kept tokens (or -1)"),
            (self.slots, 0, tokens, "slots"),
        ):
            if numbers is None:
                continue
            outside = (numbers < first) | (numbers >= end)
            if bool(outside.any()):
                raise PlanError(
                    f"members must be of {what} in [0, {end}), got {numbers[outside].tolist()}"
                )

    def into(self, kept: int) -> Tensor:
        """`(batch, entries)` int64 kept token of each entry; `kept` where it has no share."""
        return torch.where((self.shares != 0) & (self.goals >= 0), self.goals, kept)

    def spread(self, values: Tensor, none: int = 0) -> Tensor:
        """Value of the kept token that each entry is part of.

        Args:
            values: `(batch, kept)`.
            none: value where an entry is part of no kept token.

        Returns:
            `(batch, entries)`.
        """
        goal = torch.where(self.goals < 0, values.shape[1], self.goals)
        return F.pad(values, (0, 1), value=none).gather(1, goal)

    def counts(self, kept: int) -> Tensor:
        """`(batch, kept)` int64, number of slots that each kept token is made of."""
        goal = self.into(kept)
        found = goal.new_zeros(goal.shape[0], kept + 1)
        return found.scatter_add_(1, goal, torch.ones_like(goal))[:, :kept]

    def add_up(self, x: Tensor, kept: int) -> Tensor:
        """Sum of the members of each kept token, by their shares.

        A slot without a share in a token cannot reach it, as 0 * inf would in a matrix product. On
        every device a sum runs over its entries in their order: none uses atomics.

        Args:
            x: `(batch, tokens, channels)`, floating-point.
            kept: number of kept tokens.

        Returns:
            `(batch, kept, channels)` of the dtype of `x`.
        """
        batch, tokens, channels = x.shape
        if kept == 0 or tokens == 0:
            return x.new_zeros(batch, kept, channels)
        row = torch.arange(batch, device=x.device)[:, None]
        # What has no share in any goes to a spare token at the end of its row.
        target = (self.into(kept) + row * (kept + 1)).flatten()
        if self.slots is None and x.device.type == "cpu":
            terms = (x * self.shares.to(x.dtype)[:, :, None]).flatten(0, 1)
            summed = x.new_zeros(batch * (kept + 1), channels).index_add(0, target, terms)
        else:
            index = self._slots() + row * tokens
            summed = _segment_sums(x, index, self.shares, target, batch * (kept + 1))
        return summed.reshape(batch, kept + 1, channels)[:, :kept]

    def sizes(self, sizes: Tensor, kept: int) -> Tensor:
        """`(batch, kept)` sum of the `(batch, tokens)` `sizes` of members, whatever their share."""
        whole = replace(self, shares=(self.shares != 0).to(torch.float32))
        return whole.add_up(sizes[:, :, None], kept).squeeze(2)

    def share_of(self, anchors: Tensor) -> Tensor:
        """`(batch, kept)` float32, share that the slot `anchors` has in its own kept token."""
        batch, kept = anchors.shape
        if self.slots is None:
            own = self.goals.gather(1, anchors) == torch.arange(kept, device=anchors.device)
            return torch.where(own, self.shares.gather(1, anchors), 0)
        goal = self.into(kept)
        own = F.pad(anchors, (0, 1), value=-1).gather(1, goal) == self.slots
        found = self.shares.new_zeros(batch, kept + 1)
        return found.scatter_(1, torch.where(own, goal, kept), self.shares)[:, :kept]

    def owners(self, tokens: int) -> Tensor:
        """`(batch, tokens)` int64 kept token in which each slot has the largest share, or -1."""
        part = (self.goals >= 0) & (self.shares > 0)
        if self.slots is None:
            return torch.where(part, self.goals, -1)
        shape, none = (self.goals.shape[0], tokens), torch.iinfo(torch.int64).max
        share = torch.where(part, self.shares, 0)
        best = self.shares.new_zeros(shape).scatter_reduce_(1, self.slots, share, reduce="amax")
        largest = part & (self.shares == best.gather(1, self.slots))
        owner = self.goals.new_full(shape, none).scatter_reduce_(
            1, self.slots, torch.where(largest, self.goals, none), reduce="amin"
        )
        return owner.masked_fill(owner == none, -1)

    def dense(self, tokens: int, kept: int) -> Tensor:
        """`(batch, kept, tokens)` float32 matrix of all shares."""
        batch, cell = self.goals.shape[0], self.into(kept) * tokens + self._slots()
        matrix = self.shares.new_zeros(batch, (kept + 1) * tokens)
        matrix.scatter_add_(1, cell, self.shares)
        return matrix.reshape(batch, kept + 1, tokens)[:, :kept]

    def take_rows(self, rows: Tensor) -> Memberships:
        """Memberships of some rows, `(n,)` int64."""
        goals, shares = self.goals.index_select(0, rows), self.shares.index_select(0, rows)
        return Memberships(
            goals, shares, None if self.slots is None else self.slots.index_select(0, rows)
        )

    def moved(self, onto: Tensor) -> Memberships:
        """The same shares of other kept tokens: `(batch, kept)` int64 `onto` says which, or -1."""
        return replace(self, goals=self.spread(onto, -1))

    def drawn(self, anchors: Tensor, mask: Tensor) -> Memberships:
        """The same for the slots from which a selection, `(batch, kept)`, took its tokens."""
        slots = self._slots()
        shares = torch.where(mask.gather(1, slots), self.shares, 0)
        return Memberships(self.goals, shares, anchors.gather(1, slots))

    def then(self, after: Memberships, between: int) -> Memberships:
        """These memberships, followed by `after` of the `between` tokens that they give.

        Where a slot may be part of several tokens the second time, counting how many takes a host
        sync.
        """
        if after.slots is None:
            shares = self.shares * self.spread(after.shares)
            made = replace(self.moved(after.goals), shares=shares)
            return made if self.slots is None else made._joined()
        entered, order = torch.where(after.shares != 0, after.slots, between).sort(stable=True)
        numbers = torch.arange(between + 1, device=order.device).repeat(len(order), 1)
        first = torch.searchsorted(entered, numbers)
        count = first.diff()
        repeats = int(count.max()) if count.numel() else 0
        nth = torch.arange(repeats, device=order.device)
        there = (nth < self.spread(count)[:, :, None]).flatten(1)
        each = (self.spread(first[:, :-1])[:, :, None] + nth).flatten(1)
        entry = order.gather(1, torch.where(there, each, 0))
        made = Memberships(
            after.goals.gather(1, entry).masked_fill(~there, -1),
            self.shares.repeat_interleave(repeats, 1) * after.shares.gather(1, entry),
            self._slots().repeat_interleave(repeats, 1),
        )
        return made._joined()

    def _joined(self) -> Memberships:
        """The same with one entry for each pair of slot and kept token."""
        slots, (batch, entries) = self._slots(), self.goals.shape
        if entries == 0:
            return self
        key, order = (slots * (self.goals.max() + 2) + self.goals + 1).sort(stable=True)
        new = F.pad(key.diff() != 0, (1, 0), value=True)
        row = torch.arange(batch, device=key.device)[:, None] * entries
        target = (new.cumsum(1) - 1 + row).flatten()
        shares = self.shares[:, :, None]
        total = _segment_sums(
            shares, order + row, torch.ones_like(self.shares), target, len(target)
        )
        total = total.flatten().index_select(0, target).reshape(batch, entries)
        return Memberships(
            self.goals.gather(1, order), torch.where(new, total, 0), slots.gather(1, order)
        )

    def _slots(self) -> Tensor:
        if self.slots is not None:
            return self.slots
        return torch.arange(self.goals.shape[1], device=self.goals.device).expand_as(self.goals)


def _segment_sums(x: Tensor, index: Tensor, shares: Tensor, target: Tensor, sums: int) -> Tensor:
    """`(sums, channels)` weighted sums over segments of entries, which are sorted for it.

    Args:
        x: `(batch, tokens, channels)`.
        index: `(batch, entries)` int64 token of each entry, counted over all rows.
        shares: `(batch, entries)` float32, its weight.
        target: `(batch * entries,)` int64, the sum that it goes to.
        sums: number of sums.
    """
    target, order = target.sort(stable=True)
    first = torch.searchsorted(target, torch.arange(sums, device=x.device))
    weights = shares.flatten().index_select(0, order).to(x.dtype)
    tokens = index.flatten().index_select(0, order)
    return F.embedding_bag(tokens, x.flatten(0, 1), first, mode="sum", per_sample_weights=weights)
