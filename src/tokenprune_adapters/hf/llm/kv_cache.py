"""KV cache of a shortened prompt: what its layers know, and what is told them of a pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from tokenprune.errors import AttachError, UnsupportedError

from .cache_layers import (
    Shortened,
    ShortenedDynamicLayer,
    ShortenedLayer,
    ShortenedStaticLayer,
    shortened,
)

_SERVED = (DynamicLayer, StaticLayer, ShortenedDynamicLayer, ShortenedStaticLayer)
_STATES = getattr(cache_utils, "LinearAttentionLayer", ())
"""Layer of a state that runs along: it holds nothing per token, so a short prompt is all it saw."""


def storing(cache: Cache | None, start: int = 0) -> list[tuple[int, Any]]:
    """Number and layer of all layers of `cache` that hold keys and values, from `start` on.

    Raises:
        UnsupportedError: a cache without layers, such as the pages of continuous batching.
    """
    layers: Any = [] if cache is None else getattr(cache, "layers", None)
    if layers is None:
        raise UnsupportedError(
            f"a {type(cache).__name__} cannot hold shortened prompts: continuous batching "
            "(generate_batch, transformers serve) is not served while a model is attached; use "
            "generate with a batch, or vLLM ('Serve with vLLM' in the documentation)"
        )
    return [(n, each) for n, each in enumerate(layers) if n >= start and not _is_state(each)]


def _is_state(layer: Any) -> bool:
    return isinstance(layer, _STATES) and not isinstance(layer, DynamicLayer)


def state_of(cache: Cache | None, number: int | None = None) -> Shortened | None:
    """How layer `number` of `cache` was shortened, or any layer; None if it was not.

    What holds nothing yet has no state, though it may know of how much it will not hold.
    """
    layers = [layer for _, layer in storing(cache, number or 0)]
    layers = layers if number is None else layers[:1]
    known = (each for each in layers if isinstance(each, ShortenedLayer) and each.is_initialized)
    return next((layer.state for layer in known), None)


def moved_down(positions: Tensor, moved: Tensor | None) -> Tensor:
    """`(batch, slots)` positions that are less by `(batch,)` `moved`."""
    return positions if moved is None else positions - moved[:, None]


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
    for _, layer in storing(cache):
        if type(layer) not in _SERVED:
            raise UnsupportedError(
                f"{type(layer).__name__} in {type(cache).__name__} cannot hold a shortened "
                "prompt; use a DynamicCache (cache_implementation='dynamic', the default), or a "
                "StaticCache of a model without sliding windows"
            )


def check_starts(cache: Cache | None, starts: tuple[int, ...]) -> None:
    """Refuse a cache whose prompt was shortened before other layers than `starts`.

    All layers between two starts must hold the same slots, since they share one mask.
    """
    layers = [layer for _, layer in storing(cache)]
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
    state = states[0]
    for number, layer in storing(cache):
        state = states.get(number, state)
        if not isinstance(layer, ShortenedLayer):
            cache.layers[number] = shortened(layer, state)
        elif layer.state is not state:
            layer.state = state


def fixed_alike(states: dict[int, Shortened], end: int) -> dict[int, Shortened]:
    """States that let as many of the newest slots be cropped as the strictest of them.

    Args:
        states: by their first layer.
        end: logical length.
    """
    tail = min(end - state.offset - state.fixed for state in states.values())
    return {n: replace(each, fixed=end - each.offset - tail) for n, each in states.items()}


@dataclass(frozen=True)
class Room:
    """Room of a static cache layer: it hands back all its slots, filled or not.

    Attributes:
        logical: slots of the prompt that it has room for.
        physical: slots that it has; None where they are not allocated yet.
    """

    logical: int
    physical: int | None

    @classmethod
    def of(cls, cache: Cache | None, number: int) -> Room | None:
        """The room of layer `number`; None of a layer that grows."""
        for _, layer in storing(cache, number)[:1]:
            if isinstance(layer, StaticLayer):
                physical = layer.max_cache_len if layer.is_initialized else None
                return cls(layer.get_max_length(), physical)
        return None

    def slots(self, offset: int) -> int:
        """Physical slots once `offset` logical ones have none."""
        return self.logical - offset if self.physical is None else self.physical


def make_room(cache: Cache | None, start: int, offset: int) -> None:
    """Let static layers from `start` on allocate no slots for what a prompt leaves out."""
    layers = cache.layers if cache is not None else []
    for number in range(start, len(layers)):
        layer = layers[number]
        if isinstance(layer, StaticLayer) and not layer.is_initialized:
            layers[number] = ShortenedStaticLayer.empty(layer, offset)


def stored_bytes(cache: Cache | None) -> tuple[int, int]:
    """Bytes of keys and values as stored, and as an unpruned model would have stored them.

    Zeros without a cache, and for one whose layers hold more slots than were filled, or fewer. A
    static one of a shortened prompt stores what it has allocated.
    """
    stored = vanilla = 0
    layers = [layer for _, layer in storing(cache)]
    if any(type(layer) not in _SERVED or type(layer) is StaticLayer for layer in layers):
        return 0, 0
    for layer in layers:
        # Not `nbytes`, which torch.compile cannot trace where lengths vary.
        size = sum(each.numel() * each.element_size() for each in (layer.keys, layer.values))
        stored += size
        slots = layer.keys.shape[-2]
        offset = layer.state.offset if isinstance(layer, ShortenedLayer) else 0
        vanilla += size * (slots + offset) // slots if slots else 0
    return stored, vanilla
