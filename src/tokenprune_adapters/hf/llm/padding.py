"""Padding of a prompt, and seams between conversations that share a row: what mask and ids tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedError

from ...kit.prompt_layout import samples
from ..anatomy import ATTENTION, attention_of, makes_cache
from ..names import Call
from .position_planes import PLANES, inwards, of_text


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
    # M-RoPE counts text in a plane of its own, if at all.
    positions = None if call.positions is None else of_text(inwards(call.positions))
    if positions is None or slots == 1:
        return None
    cached = call.cache is not None or makes_cache(llm, call.wants_cache)
    looks = not cached or ("flash" in attention_of(llm) and batch == 1)
    return samples(positions.expand(batch, slots)) if looks else None


def are_seams(llm: nn.Module, call: Call, all_real: bool) -> bool:
    """Whether steps in position ids are seams between conversations: no mask says otherwise.

    A mask without padding is none to FlashAttention.
    """
    return call.mask is None or (all_real and "flash" in attention_of(llm))


def no_images() -> None:
    """No images."""


def length_of(cache: Any) -> int | Tensor:
    """Logical length of a cache before the pass; `()` int64 of a static one."""
    length: int | Tensor = 0 if cache is None else cache.get_seq_length()
    return length


@dataclass(frozen=True, eq=False)
class Padding:
    """Padding of a pass, as its attention mask tells.

    Attributes:
        columns: `(batch, columns)` bool, False for padding; None where there is none.
        odd: `()` bool: whether the mask says more than that; None where it cannot.
        past: logical length of the cache.
        shape: batch and slots that the pass brings.
        refused: shape or type of a mask that cannot be read, for the message; empty if it can.
    """

    columns: Tensor | None
    odd: Tensor | None
    past: int | Tensor
    shape: tuple[int, int]
    refused: str = ""

    @classmethod
    def of(cls, mask: Any, past: int | Tensor, slots: Tensor) -> Padding:
        """What `mask` tells: one number per column, or causal and 4-D as `generate` makes it.

        Args:
            mask: of a call of the language model.
            past: logical length of the cache.
            slots: `(batch, slots, ...)` of the pass.
        """
        shape = (slots.shape[0], slots.shape[1])
        if isinstance(mask, Mapping):
            (mask,) = mask.values() if len(mask) == 1 else (mask.get(ATTENTION, mask),)
        if mask is None:
            return cls(None, None, past, shape)
        if not isinstance(mask, Tensor):
            return cls(None, None, past, shape, type(mask).__name__)
        mask = mask.to(slots.device)
        if mask.ndim == 4 and mask.shape[:3] == (shape[0], 1, shape[1]):
            seen = mask if mask.dtype == torch.bool else mask == 0
            columns = seen[:, 0, -1]
            if isinstance(past, int) and columns.shape[1] >= past + shape[1]:
                return cls(columns, _says_more(mask, seen[:, 0], columns, past), past, shape)
            if not isinstance(past, int):
                return cls(columns, None, past, shape)
        wide = not isinstance(past, int) or mask.shape[-1] == past + shape[1]
        if mask.ndim == 2 and mask.shape[0] == shape[0] and wide:
            return cls(mask.bool(), None, past, shape)
        return cls(None, None, past, shape, str(tuple(mask.shape)))

    def check(self) -> None:
        """Refuse a mask that is none of padding.

        Raises:
            UnsupportedError: it has another shape, or shows other columns than those before.
        """
        if self.refused:
            raise UnsupportedError(
                f"attention_mask must have axes (batch tokens) = ({self.shape[0]}, "
                f"{self.past + self.shape[1]}) to shorten a prompt, or be the 4-D mask that "
                f"generate makes of such a one, got {self.refused}; custom masks are not supported"
            )

    def check_odd(self, odd: bool | int) -> None:
        """Refuse a 4-D mask that says more, once that is known."""
        if odd:
            raise UnsupportedError(
                "a 4-D attention_mask that is not causal, or hides more than padding, cannot be "
                "shortened; pass one with axes (batch tokens)"
            )

    def real(self, like: Tensor) -> Tensor:
        """`(batch, slots)` bool: which of the pass are no padding.

        Args:
            like: a tensor on their device.
        """
        if self.columns is None:
            return torch.ones(self.shape, dtype=torch.bool, device=like.device)
        if isinstance(self.past, int):
            return self.columns[:, self.past : self.past + self.shape[1]]
        new = self.past + torch.arange(self.shape[1], device=self.columns.device)
        return self.columns.index_select(1, new)

    @property
    def real_past(self) -> Tensor | None:
        """`(batch, past)` bool of what is cached; None where there is no padding, or nothing."""
        known = self.columns is not None and isinstance(self.past, int) and self.past > 0
        return self.columns[:, : self.past] if known and self.columns is not None else None


def _says_more(mask: Tensor, seen: Tensor, columns: Tensor, past: int) -> Tensor:
    """`()` bool: whether real slots see other columns than the real ones up to their own."""
    slots, width = seen.shape[1:]
    every = torch.arange(width, device=seen.device)
    causal = every <= past + torch.arange(slots, device=seen.device)[:, None]
    real = columns[:, past : past + slots, None]
    more = (real & (seen != (causal & columns[:, None]))).any()
    if mask.dtype != torch.bool:
        more = more | ((mask != 0) & (mask > torch.finfo(mask.dtype).min / 2)).any()
    return more


def positions_of(
    given: Tensor | None, past: int | Tensor, slots: Tensor, planes: bool = False
) -> Tensor:
    """`(batch, tokens)` int64 logical positions, the model's own default where none are given.

    Args:
        given: of a call of the language model.
        past: logical length of its cache.
        slots: `(batch, tokens, ...)` of the pass.
        planes: whether positions may be M-RoPE's, which come out as `(batch, tokens, planes)`.
    """
    if given is None:
        given = past + torch.arange(slots.shape[1], device=slots.device)[None]
    if given.ndim != 2 and not (planes and given.ndim == 3 and given.shape[0] in PLANES):
        axes = "(batch tokens), or (3 or 4 planes, batch, tokens)" if planes else "(batch tokens)"
        raise UnsupportedError(f"position_ids must be {axes}, got {tuple(given.shape)}")
    positions = inwards(given.to(slots.device))
    return positions.expand(slots.shape[0], slots.shape[1], *positions.shape[2:])
