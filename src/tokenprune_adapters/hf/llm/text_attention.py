"""Attention rows of the text over the tokens of images, in a decoder layer: no full map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import einsum
from torch import Tensor

from ...kit.prompt_layout import PromptLayout
from ..attention import Asked
from .image_slots import Images, Seats


@dataclass(frozen=True, eq=False)
class Prompts:
    """Slots of a batch of prompts that are under way, as a layer computes them.

    Attributes:
        real: `(batch, slots)` bool, False for padding and fillers.
        valid: `(batch, keys)` bool, the same with cached slots in front; None where all are real.
        sample: `(batch, slots)` int64, the conversation of each slot where a row holds several;
            None where it holds one.
    """

    real: Tensor
    valid: Tensor | None
    sample: Tensor | None

    def to(self, device: torch.device) -> Prompts:
        """The same on another device."""
        valid, sample = (None if x is None else x.to(device) for x in (self.valid, self.sample))
        return Prompts(self.real.to(device), valid, sample)

    def visible(self, queries: Tensor, keys: int) -> Tensor:
        """`(batch, queries, keys)` bool: what `(batch, queries)` slots may attend to."""
        slots = self.real.shape[1]
        numbers = torch.arange(keys, device=queries.device)
        visible = numbers <= (queries + keys - slots)[:, :, None]
        if self.valid is not None:
            visible = visible & self.valid[:, None, :]
        if self.sample is not None:  # there is no cache, so keys are slots
            asking = self.sample.gather(1, queries)
            visible = visible & (asking[:, :, None] == self.sample[:, None, :])
        return visible

    def last(self) -> Tensor:
        """`(batch, conversations)` int64, the last real slot of each; 0 where there is none."""
        numbers = torch.arange(self.real.shape[1], device=self.real.device)
        numbers = torch.where(self.real, numbers, -1)
        if self.sample is None:
            return numbers.amax(1, keepdim=True).clamp(min=0)
        of = self.sample.clamp(min=0)
        last = numbers.new_full((of.shape[0], int(of.max()) + 1), -1)
        return last.scatter_reduce(1, of, numbers, "amax").clamp(min=0)

    def conversation(self, row: Tensor, column: Tensor) -> Tensor:
        """Number of the conversation, in its row, that some slots belong to."""
        return torch.zeros_like(row) if self.sample is None else self.sample[row, column]


def last_rows(asked: Asked, prompts: Prompts, row: Tensor, column: Tensor) -> Tensor:
    """Attention of the last token of each image's conversation, `(images, heads, tokens)`.

    Args:
        asked: queries and keys of the layer.
        prompts: the slots that they are of.
        row: `(images,)` int64, the row of the batch that each image is in.
        column: `(images, tokens)` int64, the slot of each visual token, counted from the end of
            what is cached.
    """
    queries = prompts.last()
    rows = asked.rows(queries, prompts.visible(queries, asked.key.shape[2]))
    which = prompts.conversation(row, column[:, 0])
    return _columns(rows[row, :, which], column, prompts)


def text_rows(asked: Asked, prompts: Prompts, images: Images, seats: Seats) -> Tensor:
    """Mean attention of the text after each image to it, `(images, heads, tokens)`.

    The text is that of the image's conversation; an image that ends it is asked about by the last
    token alone.
    """
    row, column = seats.row, seats.column
    numbers = torch.arange(seats.slots, device=column.device)
    in_image = images.image >= 0
    text = prompts.real & ~in_image & (in_image.cumsum(1) > 0)
    last = prompts.last()
    ends = (numbers[:, None] == last[:, None, :]).any(-1)
    # Rows with fewer conversations than others have a filler for the last token of the rest.
    queries = PromptLayout.of(text | (ends & prompts.real))
    rows = asked.rows(queries.index, prompts.visible(queries.index, asked.key.shape[2]))
    if queries.valid is not None:
        # A filler may be padding, which attends to nothing: NaN.
        rows = rows.masked_fill(~queries.valid[:, None, :, None], 0)
    which = prompts.conversation(row, column[:, 0])
    index = queries.index[row]
    asks = text[row].gather(1, index) & (index > column.amax(1, keepdim=True))
    if prompts.sample is not None:
        asks &= prompts.sample[row].gather(1, index) == which[:, None]
    alone = ~asks.any(1, keepdim=True)
    asks = torch.where(alone, index == last[row].gather(1, which[:, None]), asks).float()
    weight = asks / asks.sum(1, keepdim=True)
    mean = einsum(rows[row], weight, "image heads query key, image query -> image heads key")
    return _columns(mean, column, prompts)


def _columns(rows: Tensor, column: Tensor, prompts: Prompts) -> Tensor:
    """`(images, heads, keys)` to `(images, heads, tokens)`; slots are the newest keys."""
    columns = column + rows.shape[2] - prompts.real.shape[1]
    return rows.gather(2, columns[:, None, :].expand(-1, rows.shape[1], -1))
