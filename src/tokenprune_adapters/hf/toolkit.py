"""Toolkit for adapters of models of transformers that are no family.

A model that keeps to the conventions of transformers (placeholders, `get_image_features`) is a
`Family`: data. One that does not, such as code that comes with a checkpoint, has an adapter of its
own, put together from this and from `tokenprune_adapters.kit`:

| part | what it does |
|---|---|
| `tower_adapter` | the adapter of the model's vision tower, whoever offers it |
| `EncoderTower` | base of an adapter for a tower whose blocks have `q_proj` and `k_proj` |
| `shorten_prompts` | a language model of transformers that computes and caches what is left |
| `resolve_layers` | which blocks a signal means by `layers` |

`kit.before_projector.ReduceBeforeProjector` stands between the first and the third: it reduces, and
marks what is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from tokenprune.hooks import NotCopyable, Removable
from tokenprune.placement import Positions
from tokenprune.report import Record
from tokenprune.signals import resolve_layers

from .before_projector import tower_adapter
from .encoder_tower import EncoderTower
from .llm.inner_stages import ReduceInside
from .llm.layer_hooks import install_between
from .llm.run import TEXT
from .llm.short_prompt import ShortenPrompts
from .llm.signal_cache import SignalCache
from .names import calls_of

__all__ = ["EncoderTower", "resolve_layers", "shorten_prompts", "tower_adapter"]


def shorten_prompts(
    llm: nn.Module, record: Record, positions: Positions = "reindexed"
) -> Iterator[Removable]:
    """Yield the hooks that let a language model compute and cache what is left of its prompts.

    It must be called with `inputs_embeds`, in which dropped slots are marks
    (`tokenprune_adapters.kit.marks`). Padding is rebuilt for each row, position ids and masks of
    later steps and turns are translated, hidden states come back at the caller's length, beams and
    dynamic and static caches of transformers work, and the bytes of the KV cache are reported.
    What cannot be served, such as sliding windows, is refused in words.

    Args:
        llm: decoder without its head, such as `LlamaModel`, with `layers`.
        record: where KV bytes are noted.
        positions: ``"reindexed"`` counts what is left anew, ``"original"`` leaves gaps.
    """
    yield llm.register_forward_pre_hook(_Decoding(llm).before, with_kwargs=True)
    to_layers = positions == "original"
    yield from ShortenPrompts(llm, positions, record, to_layers=to_layers).install()
    if to_layers:  # the first layer tells the others
        store = SignalCache(lambda: next(llm.parameters()).dtype)
        yield from install_between(ReduceInside(llm, {}, store, record))


class _Decoding(NotCopyable):
    """Hook that tells a decoding step from a prompt: there are no marks to wait for."""

    def __init__(self, llm: nn.Module) -> None:
        self.calls = calls_of(llm)

    def before(
        self, llm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        embeds = self.calls(args, kwargs).embeds
        if embeds is not None and embeds.shape[1] == 1:
            kwargs[TEXT] = True
        return args, kwargs
