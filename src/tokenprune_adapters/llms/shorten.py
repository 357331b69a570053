"""Run a language model of transformers on a shortened prompt, while its caller sees a whole one.

The hook before the model takes marked (dropped) slots and padding out of the embeddings, masks and
position ids; the hook after it tells the cache, and puts hidden states back to logical length, so
that logits, labels, `logits_to_keep` and `generate` need not know.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.adapter import NotCopyable, Removable
from tokenprune.errors import UnsupportedError
from tokenprune.placement import Positions
from tokenprune.report import Record

from ..carry import carried, carry
from ..layout import Layout, causal_mask
from ..marks import marked
from .cache import Shortened, check_cache, expect_update, note, state_of, stored_bytes

_NEEDED = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values")


def check_llm(llm: nn.Module) -> None:
    """Refuse language models that cannot be shortened from outside.

    Raises:
        UnsupportedError: the model takes other arguments than decoders of transformers do, or
            some of its layers attend to a sliding window.
    """
    taken = inspect.signature(llm.forward).parameters
    missing = [name for name in _NEEDED if name not in taken]
    if missing:
        raise UnsupportedError(f"{type(llm).__name__} does not take {', '.join(missing)}")
    config: Any = llm.config
    kinds = set(getattr(config, "layer_types", None) or ())
    windowed = getattr(config, "sliding_window", None) and getattr(
        config, "use_sliding_window", True
    )
    if kinds - {"full_attention"} or (not kinds and windowed):
        raise UnsupportedError(
            f"{type(llm).__name__} has {', '.join(sorted(kinds)) or 'sliding_window'} layers, "
            "whose windows would count kept tokens only; only full attention is supported"
        )


@dataclass(frozen=True, eq=False)
class _Call:
    """What the hook before the model leaves for the hook after it."""

    layout: Layout | None
    state: Shortened


class ShortenPrompts(NotCopyable):
    """The two hooks on a language model.

    Args:
        positions: ``"reindexed"`` counts the kept tokens anew, ``"original"`` leaves gaps.
        record: where KV bytes are noted.
    """

    def __init__(self, positions: Positions, record: Record) -> None:
        self.positions = positions
        self.record = record

    def install(self, llm: nn.Module) -> Iterator[Removable]:
        """Yield the handles."""
        yield llm.register_forward_pre_hook(self.before, with_kwargs=True)
        yield llm.register_forward_hook(self.after, with_kwargs=True)

    def before(
        self, llm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        embeds: Tensor | None = kwargs.get("inputs_embeds")
        if embeds is None:
            return None
        cache = kwargs.get("past_key_values")
        known = state_of(cache)
        drop = marked(embeds)
        past = int(cache.get_seq_length()) if cache is not None else 0
        real, real_past = _real_columns(kwargs.get("attention_mask"), past, drop)
        shorten, all_real = torch.stack([drop.any(), real.all()]).tolist()
        if not shorten and known is None:
            return None
        check_cache(cache)
        batch = embeds.shape[0]
        state = known or Shortened(0, real_past, drop.new_zeros(batch, dtype=torch.int64), 0)
        moved = (
            drop.cumsum(1)
            if self.positions == "reindexed"
            else torch.zeros_like(drop, dtype=torch.int64)
        )
        place = _positions(kwargs.get("position_ids"), past, drop) - state.moved[:, None] - moved

        layout, valid = None, None if all_real else real
        if shorten:
            layout = Layout.of(real & ~drop)
            embeds, place, valid = layout.shorten(embeds), layout.shorten(place), layout.valid
        queries, stored = embeds.shape[1], past - state.offset
        valid = _join(state.valid, valid, batch, stored, queries, embeds.device)
        kwargs["inputs_embeds"] = carry(
            embeds,
            _Call(
                layout,
                Shortened(
                    state.offset + drop.shape[1] - queries,
                    valid,
                    state.moved + moved[:, -1],
                    0 if shorten else state.tail + queries,
                ),
            ),
        )
        kwargs["position_ids"] = place
        kwargs["attention_mask"] = self._mask(llm, valid, embeds, stored + queries, cache)
        expect_update(cache)
        return args, kwargs

    def _mask(
        self, llm: nn.Module, valid: Tensor | None, embeds: Tensor, keys: int, cache: object
    ) -> Tensor | None:
        attention = str(llm.config._attn_implementation)  # type: ignore[union-attr]
        flash = "flash" in attention
        if attention not in ("sdpa", "eager") and not flash:
            raise UnsupportedError(
                f"attention implementation {attention!r} cannot run a shortened prompt; use "
                "model.set_attn_implementation('sdpa'), 'eager' or a flash one"
            )
        if flash and self.positions == "original":
            raise UnsupportedError(
                f"{attention} takes gaps in position ids for several packed sequences; use "
                "positions='reindexed', or sdpa"
            )
        queries = embeds.shape[1]
        # Without a mask sdpa may use its fastest kernels. Gaps in the positions of a prompt that
        # has neither mask nor cache would be taken for several packed sequences.
        gaps = self.positions == "original" and cache is None
        if attention == "sdpa" and valid is None and queries in (1, keys) and not gaps:
            return None
        return causal_mask(valid, embeds.shape[0], queries, keys, attention, embeds)

    def after(
        self, llm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        call = carried(kwargs.get("inputs_embeds"))
        if not isinstance(call, _Call):
            return None
        cache = output.past_key_values
        if cache is not None:
            check_cache(cache)
            note(cache, call.state)
        if call.layout is None:
            return None
        if cache is not None:
            self.record.cached(*stored_bytes(cache))
        output.last_hidden_state = call.layout.restore(output.last_hidden_state)
        if output.hidden_states is not None:
            output.hidden_states = tuple(map(call.layout.restore, output.hidden_states))
        return output


def _real_columns(mask: Any, past: int, drop: Tensor) -> tuple[Tensor, Tensor | None]:
    """Which new and which past columns are real, as bool; None for a past without padding."""
    if mask is None:
        return torch.ones_like(drop), None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedError(
            f"attention_mask must be (batch tokens) to shorten a prompt, got {got}; static caches "
            "and custom 4-D masks are not supported"
        )
    expected = (drop.shape[0], past + drop.shape[1])
    if tuple(mask.shape) != expected:
        raise UnsupportedError(f"attention_mask must be {expected}, got {tuple(mask.shape)}")
    real = mask.to(device=drop.device, dtype=torch.bool)
    return real[:, past:], real[:, :past] if past else None


def _positions(given: Tensor | None, past: int, drop: Tensor) -> Tensor:
    """`(batch, tokens)` int64 logical positions, the model's own default where none are given."""
    if given is None:
        given = torch.arange(past, past + drop.shape[1], device=drop.device)[None]
    if given.ndim != 2:
        raise UnsupportedError(f"position_ids must be (batch tokens), got {tuple(given.shape)}")
    return given.to(drop.device).expand(drop.shape)


def _join(
    past: Tensor | None,
    new: Tensor | None,
    batch: int,
    stored: int,
    queries: int,
    device: torch.device,
) -> Tensor | None:
    """Validity of all physical slots; None where every one is real."""
    if past is None and new is None:
        return None
    past = torch.ones(batch, stored, dtype=torch.bool, device=device) if past is None else past
    new = torch.ones(batch, queries, dtype=torch.bool, device=device) if new is None else new
    return torch.cat([past, new], dim=1)
