"""Slots of all rows of a call, and what a plan makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenprune.gather import gather_flat, zero_fillers
from tokenprune.plan import Plan
from tokenprune.to_device import numbers_on, sent

from .picture_rows import PictureRow


@dataclass(frozen=True, eq=False)
class Slots:
    """Slots of all rows of a call, one after the other.

    Attributes:
        index: `(rows, tokens)` int64, the slot of each token: of those with a patch.
        mask: `(rows, tokens)` bool, False where a row has fewer.
        patches: `(rows, tokens)` int64, the patch of its row that each is; 0 where padded.
        tokens: number of tokens of each row.
    """

    index: Tensor
    mask: Tensor
    patches: Tensor
    tokens: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[PictureRow], device: torch.device) -> Slots:
        """From rows on the CPU."""
        held = [row.tokens for row in rows]
        shown = [row.patches[row.patches >= 0] for row in rows]
        index, patches = (pad_sequence(each, batch_first=True) for each in (held, shown))
        index, patches = sent(torch.stack([index, patches]), device)
        tokens = tuple(map(len, held))
        mask = torch.arange(index.shape[1], device=device) < numbers_on(device, tokens)[:, None]
        return cls(index, mask, patches, tokens)

    def take(self, x: Tensor) -> Tensor:
        """`(slots, ...)` to `(rows, tokens, ...)`, zero where padded."""
        return zero_fillers(gather_flat(x[None], self.index), self.mask)

    def reduced(self, x: Tensor, plan: Plan, gone: float) -> Tensor:
        """`(slots, channels)` with what `plan` makes of tokens at its anchors.

        Args:
            x: of all slots.
            plan: for the tokens of the rows.
            gone: what slots of other tokens hold.
        """
        last = len(x)  # one slot more, to which fillers are written
        whole = torch.cat([x, x.new_zeros(1, x.shape[1])])
        tokens = self.index.masked_fill(~self.mask, last).flatten()
        anchors = self.index.gather(1, plan.anchors).masked_fill(~plan.mask, last).flatten()
        kept = plan(self.take(x)).flatten(0, 1)
        return whole.index_fill(0, tokens, gone).index_copy(0, anchors, kept)[:-1]
