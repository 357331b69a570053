"""Layout of a shortened prompt: which slots are computed, and how it is shown at full length.

Pure tensor functions. *Logical* is the prompt as the processor made it, *physical* is what the
language model computes and caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.gather import gather_rows, zero_fillers


@dataclass(frozen=True, eq=False)
class PromptLayout:
    """Logical slots that are computed, right-aligned in every row.

    >>> layout = PromptLayout.of(torch.tensor([[True, False, True], [True, True, True]]))
    >>> layout.shorten(torch.tensor([[5, 6, 7], [1, 2, 3]]))
    tensor([[0, 5, 7],
            [1, 2, 3]])
    >>> layout.restore(torch.tensor([[0, 50, 70], [10, 20, 30]]))
    tensor([[50, 50, 70],
            [10, 20, 30]])

    Attributes:
        index: `(batch, physical)` int64, the logical slot that each physical one holds.
        valid: `(batch, physical)` bool, False for fillers; None where there are none.
        back: `(batch, logical)` int64, the physical slot whose state each logical slot shows: its
            own, or for a dropped one that of the last kept before it in the same conversation, or
            where there is none, of the first.
        tail: number of newest slots that every row keeps.
    """

    index: Tensor
    valid: Tensor | None
    back: Tensor
    tail: int

    @classmethod
    def facts(cls, keep: Tensor) -> Tensor:
        """Numbers that `of` needs in Python, `(3,)` int64, for whoever asks for others as well."""
        count = keep.sum(1)
        kept_by_all = keep.all(0).flip(0).to(torch.int64).cumprod(0).sum()
        return torch.stack([count.max(), count.min(), kept_by_all])

    @classmethod
    def of(
        cls, keep: Tensor, sample: Tensor | None = None, facts: Sequence[int] | None = None
    ) -> PromptLayout:
        """The layout that computes some slots. One sync, unless the facts are known.

        Args:
            keep: `(batch, logical)` bool, True for the slots to compute.
            sample: `(batch, logical)` int64, the conversation of each slot where rows hold
                several, one after the other; None where each holds one.
            facts: what `facts` gives for `keep`, as numbers; None to wait for them.
        """
        count = keep.sum(1)
        longest, shortest, tail = cls.facts(keep).tolist() if facts is None else facts
        physical = max(longest, 1)
        order = torch.argsort(keep.to(torch.uint8), dim=1, stable=True)
        index = order[:, keep.shape[1] - physical :]
        valid = None if shortest == physical else keep.gather(1, index)
        rank = keep.cumsum(1) - 1
        if sample is not None:
            rank = torch.maximum(rank, before_sample(keep, sample))
        back = (rank + (physical - count)[:, None]).clamp(min=0, max=physical - 1)
        return cls(index, valid, back, tail)

    def shorten(self, x: Tensor) -> Tensor:
        """`(batch, logical, ...)` to `(batch, physical, ...)`; fillers are zero."""
        short = gather_rows(x, self.index)
        # A filler may hold -inf, which poisons values even where attention masks it.
        return short if self.valid is None else zero_fillers(short, self.valid)

    def restore(self, x: Tensor) -> Tensor:
        """`(batch, physical, ...)` to `(batch, logical, ...)`."""
        return gather_rows(x, self.back)


def samples(positions: Tensor) -> Tensor:
    """`(batch, slots)` int64: the conversation of each slot, counted in its row.

    Position ids that do not go on by one are a seam between conversations that share a row, as
    transformers takes them where neither mask nor cache says otherwise.

    >>> samples(torch.tensor([[0, 1, 2, 0, 1]]))
    tensor([[0, 0, 0, 1, 1]])
    """
    steps = torch.diff(positions, dim=1, prepend=positions[:, :1] - 1)
    return (steps != 1).cumsum(1)


def before_sample(counted: Tensor, sample: Tensor) -> Tensor:
    """How many of the `(batch, slots)` bool `counted` stand in front of each slot's conversation.

    >>> before_sample(torch.tensor([[True, False, True, True]]), torch.tensor([[0, 0, 1, 1]]))
    tensor([[0, 0, 1, 1]])
    """
    first = torch.diff(sample, dim=1, prepend=sample[:, :1] - 1) != 0
    return (counted.cumsum(1) - counted.long()).masked_fill(~first, 0).cummax(1).values


def causal_mask(
    valid: Tensor | None,
    batch: int,
    queries: int,
    keys: int,
    attention: str,
    like: Tensor,
    sample: Tensor | None = None,
    stored: int | Tensor | None = None,
) -> Tensor | None:
    """Mask over physical slots for an attention implementation of transformers.

    Built here because a 4-D mask is passed through unchanged by every version of transformers,
    while the helper that builds one has changed its signature three times.

    Args:
        valid: `(batch, keys)` bool, or None where every key is real.
        batch: number of rows.
        queries: number of newest keys that ask.
        keys: number of physical slots, cached ones included.
        attention: name of the implementation, ``config._attn_implementation``.
        like: tensor of the dtype and device of the hidden states.
        sample: `(batch, keys)` int64, the conversation of each slot, which sees no other; None
            where rows hold one.
        stored: number of the slot of the first query; by default queries are the newest keys.

    Returns:
        `(batch, 1, queries, keys)` bool for sdpa, additive for eager, or for flash attention the
        `(batch, keys)` padding mask or None.
    """
    if "flash" in attention:
        return valid
    slots = torch.arange(keys, device=like.device)
    stored = keys - queries if stored is None else stored
    asking = stored + torch.arange(queries, device=like.device)[:, None]
    visible = slots[None, :] <= asking
    visible = visible.expand(batch, 1, queries, keys)
    if sample is not None:
        visible = visible & (sample[:, None, keys - queries :, None] == sample[:, None, None, :])
    if valid is not None:
        # A filler sees itself: a query that sees nothing is NaN in some kernels.
        itself = slots[None, :] == asking
        visible = (visible & valid[:, None, None, :]) | itself
    if attention == "sdpa":
        return visible
    lowest = torch.finfo(like.dtype).min
    return torch.zeros_like(visible, dtype=like.dtype).masked_fill(~visible, lowest)
