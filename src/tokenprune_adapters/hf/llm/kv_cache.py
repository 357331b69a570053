"""KV-cache layers of a shortened prompt: logical length outside, physical length inside.

`generate` counts the tokens of the prompt that the processor made, so `get_seq_length` answers
with those, while keys and values are stored for the kept ones only. The state lives on the layers
of the cache: it follows beams, copies, turns and threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from tokenprune.errors import AttachError, UnsupportedError


@dataclass(frozen=True, eq=False)
class Shortened:
    """State of a shortened KV cache layer: how its physical slots relate to the logical prompt.

    Attributes:
        offset: logical slots that have no physical one.
        valid: `(batch, physical)` bool, False for fillers; None where there are none.
        moved: `(batch,)` int64, by how much the positions of later tokens move down; None where
            they stay.
        tail: newest slots that are one to one, which may be cropped away again.
    """

    offset: int
    valid: Tensor | None
    moved: Tensor | None
    tail: int

    def of_rows(self, taken: Callable[[Tensor], Tensor]) -> Shortened:
        """The state of a cache whose rows are other ones.

        Args:
            taken: function that makes them, from `(batch, ...)`.
        """
        valid, moved = (None if x is None else taken(x) for x in (self.valid, self.moved))
        return replace(self, valid=valid, moved=moved)


class ShortenedLayer(DynamicLayer):  # type: ignore[misc]
    """Dynamic KV cache layer that stores fewer slots than it answers for."""

    state: Shortened
    expected: bool

    @classmethod
    def of(cls, layer: DynamicLayer, state: Shortened) -> ShortenedLayer:
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
        return super().update(key_states, value_states, *args, **kwargs)

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
        if removed > self.state.tail:
            raise UnsupportedError(
                f"cannot crop {removed} tokens off a cache whose prompt was shortened "
                f"{self.state.tail} tokens ago; only what came after the prompt can be removed"
            )
        self.keys: Tensor = self.keys[..., :-removed, :]
        self.values: Tensor = self.values[..., :-removed, :]
        valid = None if self.state.valid is None else self.state.valid[:, :-removed]
        self.state = replace(self.state, valid=valid, tail=self.state.tail - removed)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.state = self.state.of_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.state = self.state.of_rows(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.state = self.state.of_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def reset(self) -> NoReturn:
        raise UnsupportedError("cannot reset a cache whose prompt was shortened; make a new one")


def state_of(cache: Cache | None, number: int | None = None) -> Shortened | None:
    """How layer `number` of `cache` was shortened, or any layer; None if it was not."""
    layers = cache.layers if cache is not None else []
    layers = layers if number is None else layers[number : number + 1]
    return next((layer.state for layer in layers if isinstance(layer, ShortenedLayer)), None)


def moved_down(positions: Tensor, *moved: Tensor | None) -> Tensor:
    """`(batch, slots)` positions that are less by each of `(batch,)` `moved`."""
    for by in moved:
        positions = positions if by is None else positions - by[:, None]
    return positions


def difference(moved: Tensor | None, without: Tensor | None) -> Tensor | None:
    """`moved` minus `without`; None where nothing has moved."""
    if moved is None or without is None:
        return moved if without is None else -without
    return moved - without


def total(moved: Tensor | None, more: Tensor | None) -> Tensor | None:
    """`moved` plus `more`; None where nothing has moved."""
    return moved if more is None else more if moved is None else moved + more


def check_cache(cache: Cache | None) -> None:
    """Refuse caches whose layers cannot be shortened."""
    if getattr(cache, "offloading", False):
        raise UnsupportedError(
            "an offloaded cache cannot hold a shortened prompt: its layers move between devices "
            "on their own; use a DynamicCache without offloading"
        )
    for layer in cache.layers if cache is not None else ():
        if type(layer) not in (DynamicLayer, ShortenedLayer):
            raise UnsupportedError(
                f"{type(layer).__name__} in {type(cache).__name__} cannot hold a shortened "
                "prompt; use a DynamicCache (cache_implementation='dynamic', the default)"
            )


def check_starts(cache: Cache | None, starts: tuple[int, ...]) -> None:
    """Refuse a cache whose prompt was shortened before other layers than `starts`.

    All layers between two starts must hold the same slots, since they share one mask.
    """
    layers = cache.layers if cache is not None else []
    offsets = [layer.state.offset if isinstance(layer, ShortenedLayer) else 0 for layer in layers]
    found = {n for n in range(1, len(offsets)) if offsets[n] != offsets[n - 1]}
    if found - set(starts):
        here = ", ".join(map(str, starts)) or "no layer"
        raise AttachError(
            "the prompt in this KV cache was reduced after layer "
            f"{', '.join(map(str, sorted(found)))}, this attachment reduces after {here}; attach "
            "the same stages again, or start a new cache"
        )


def expect_update(cache: Cache | None) -> None:
    """Tell shortened layers that the next update comes from an attached model."""
    for layer in cache.layers if cache is not None else ():
        if isinstance(layer, ShortenedLayer):
            layer.expected = True


def note(cache: Cache, states: dict[int, Shortened]) -> None:
    """Put states on the layers of `cache`, each from the layer with its number on.

    Also layers that hold every slot get one, so that a pass or a crop that cannot be done is
    refused at the first layer, not half-way.
    """
    tail = min(state.tail for state in states.values())
    noted = {start: replace(state, tail=tail) for start, state in states.items()}
    state = noted[0]
    for number, layer in enumerate(cache.layers):
        state = noted.get(number, state)
        if isinstance(layer, ShortenedLayer):
            layer.state = state
        else:
            cache.layers[number] = ShortenedLayer.of(layer, state)


def stored_bytes(cache: Cache | None) -> tuple[int, int]:
    """Bytes of keys and values as stored, and as an unpruned model would have stored them.

    Zeros without a cache, and for one whose layers hold more slots than were filled, or fewer.
    """
    stored = vanilla = 0
    layers = cache.layers if cache is not None else []
    if any(type(layer) not in (DynamicLayer, ShortenedLayer) for layer in layers):
        return 0, 0
    for layer in layers:
        # Not `nbytes`, which torch.compile cannot trace where lengths vary.
        size = sum(each.numel() * each.element_size() for each in (layer.keys, layer.values))
        stored += size
        slots = layer.keys.shape[-2]
        vanilla += size * int(layer.get_seq_length()) // slots if slots else 0
    return stored, vanilla
