"""Cache layers of a shortened prompt: they answer with its logical length and store less.

`generate` counts the tokens of the prompt that the processor made, while keys and values are stored
for the kept ones only. The state lives on the layers: it follows beams, copies, turns and threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer

from tokenprune.errors import AttachError, UnsupportedError


@dataclass(frozen=True, eq=False)
class Shortened:
    """State of a shortened KV cache layer: how its physical slots relate to the logical prompt.

    Attributes:
        offset: logical slots that have no physical one.
        valid: `(batch, physical)` bool, False for fillers; None where there are none. Of a static
            layer, which has a column for each slot to come, it is never None.
        moved: `(batch,)` int64, by how much the positions of later tokens move down; None where
            they stay.
        fixed: physical slots, the oldest, that are not one to one with logical ones; what came
            after them may be cropped away again.
    """

    offset: int
    valid: Tensor | None
    moved: Tensor | None
    fixed: int

    def of_rows(self, taken: Callable[[Tensor], Tensor]) -> Shortened:
        """The state of a cache whose rows are other ones.

        Args:
            taken: function that makes them, from `(batch, ...)`.
        """
        valid, moved = (None if x is None else taken(x) for x in (self.valid, self.moved))
        return replace(self, valid=valid, moved=moved)


class ShortenedLayer:
    """KV cache layer that stores fewer slots than it answers for, beside a class of transformers.

    Attributes:
        state: how the slots relate.
        expected: whether the next update comes from an attached model.
    """

    state: Shortened
    expected: bool
    is_initialized: bool

    @classmethod
    def of(cls, layer: Any, state: Shortened) -> Self:
        """`layer` with `state`; keys and values are shared, not copied."""
        made = cls.__new__(cls)
        made.__dict__.update(layer.__dict__)
        made.state = state
        made.expected = False
        return made

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.expected:
            raise AttachError(
                "this KV cache belongs to a prompt whose visual tokens were reduced, but the "
                "attachment that knows how is not at work; attach again, or start a new cache"
            )
        self.expected = False
        return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.state = self.state.of_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.state = self.state.of_rows(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.state = self.state.of_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def reset(self) -> NoReturn:
        raise UnsupportedError("cannot reset a cache whose prompt was shortened; make a new one")


class ShortenedDynamicLayer(ShortenedLayer, DynamicLayer):  # type: ignore[misc]
    """Layer that grows by what a pass brings."""

    def get_seq_length(self, *args: Any) -> int:
        return int(super().get_seq_length(*args)) + self.state.offset

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        length, start = super().get_mask_sizes(query_length)
        return length - self.state.offset, start + self.state.offset

    def crop(self, tokens_to_remove: int) -> None:
        # On transformers 5.19 a positive number is the length to be left.
        removed = (
            -tokens_to_remove if tokens_to_remove <= 0 else self.get_seq_length() - tokens_to_remove
        )
        if removed <= 0:
            return
        check_crop(removed, self.keys.shape[-2] - self.state.fixed)
        self.keys: Tensor = self.keys[..., :-removed, :]
        self.values: Tensor = self.values[..., :-removed, :]
        valid = None if self.state.valid is None else self.state.valid[:, :-removed]
        self.state = replace(self.state, valid=valid)


class ShortenedStaticLayer(ShortenedLayer, StaticLayer):  # type: ignore[misc]
    """Layer with a fixed number of slots, of which the first ones are filled.

    Its masks are made by us alone, so towards `generate` and the model it answers with the sizes
    that the prompt as a whole would need. Its length is a tensor, which no decode step waits for.
    """

    @classmethod
    def empty(cls, layer: StaticLayer, offset: int) -> ShortenedStaticLayer:
        """`layer`, which holds nothing yet, without the slots that a prompt will not need."""
        made = cls.of(layer, Shortened(offset, None, None, 0))
        made.max_cache_len = layer.get_max_length() - offset
        made.expected = True
        return made

    def get_seq_length(self) -> Any:
        return super().get_seq_length() + self.state.offset if self.is_initialized else 0

    def get_max_length(self) -> int:
        return int(self.max_cache_len) + self.state.offset

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self.get_max_length(), 0

    def crop(self, tokens_to_remove: int) -> None:
        removed = -tokens_to_remove
        check_crop(removed, int(self.cumulative_length) - self.state.fixed)
        super().crop(tokens_to_remove)


def check_crop(removed: int, tail: int) -> None:
    """Refuse to crop what is not one to one."""
    if removed > tail:
        raise UnsupportedError(
            f"cannot crop {removed} tokens off a cache whose prompt was shortened {tail} tokens "
            "ago; only what came after the prompt can be removed"
        )


def lasting(buffer: Tensor) -> Tensor:
    """`buffer`, in which CUDA graphs of compiled decode steps may write, since it stays there."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(buffer)
    return buffer


def shortened(layer: Any, state: Shortened) -> ShortenedLayer:
    """A cache layer of transformers with `state`."""
    static = isinstance(layer, StaticLayer)
    return (ShortenedStaticLayer if static else ShortenedDynamicLayer).of(layer, state)
