"""Padding of a prompt, and seams between conversations that share a row: what mask and ids tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedError

from ...kit.prompt_layout import samples
from ..anatomy import attention_of, makes_cache
from ..names import Call


def steps_of(llm: nn.Module, call: Call, shape: Sequence[int]) -> Tensor | None:
    """`(batch, slots)` int64: a number that grows where position ids do not go on by one.

    None where transformers does not look: beside a cache FlashAttention alone does, in a batch of
    one row.

    Args:
        llm: the language model.
        call: a call of it, or of a model that hands these arguments on to it.
        shape: batch and slots.
    """
    batch, slots = shape
    if call.positions is None or slots == 1:
        return None
    cached = call.cache is not None or makes_cache(llm, call.wants_cache)
    looks = not cached or ("flash" in attention_of(llm) and batch == 1)
    return samples(call.positions.expand(batch, slots)) if looks else None


def are_seams(llm: nn.Module, call: Call, all_real: bool) -> bool:
    """Whether steps in position ids are seams between conversations: no mask says otherwise.

    A mask without padding is none to FlashAttention.
    """
    return call.mask is None or (all_real and "flash" in attention_of(llm))


def no_images() -> None:
    """No images."""


def length_of(cache: Any) -> int:
    """Logical length of a cache before the pass."""
    return int(cache.get_seq_length()) if cache is not None else 0


def is_padding_mask(mask: Any, past: int, drop: Tensor) -> bool:
    """Whether a mask has a column for each cached and each new slot, or is None."""
    if mask is None:
        return True
    columns = (drop.shape[0], past + drop.shape[1])
    return isinstance(mask, Tensor) and tuple(mask.shape) == columns


def refuse_mask(mask: Any, past: int, drop: Tensor) -> NoReturn:
    """Refuse a mask that is none of padding."""
    got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise UnsupportedError(
        "attention_mask must have axes (batch tokens) = "
        f"{(drop.shape[0], past + drop.shape[1])} to shorten a prompt, got {got}; static caches "
        "and custom 4-D masks are not supported"
    )


def real_columns(mask: Tensor | None, past: int, drop: Tensor) -> tuple[Tensor, Tensor | None]:
    """Which new and which past columns are real, as bool; None for a past without padding."""
    if mask is None:
        return torch.ones_like(drop, dtype=torch.bool), None
    real = mask.to(device=drop.device, dtype=torch.bool)
    return real[:, past:], real[:, :past] if past else None


def positions_of(given: Tensor | None, past: int, drop: Tensor) -> Tensor:
    """`(batch, tokens)` int64 logical positions, the model's own default where none are given."""
    if given is None:
        given = torch.arange(past, past + drop.shape[1], device=drop.device)[None]
    if given.ndim != 2:
        raise UnsupportedError(f"position_ids must be (batch tokens), got {tuple(given.shape)}")
    return given.to(drop.device).expand(drop.shape)
