"""Segment: decoder layers in a row that compute the same tokens of a prompt.

Without anything reduced there is one segment, the whole model. A reduction before the LLM shortens
that one; each reduction after a layer starts another, which has its own slots, validity, positions,
attention mask and cache state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedError
from tokenprune.placement import Positions
from tokenprune.spec import shown
from tokenprune.strategy import Stage

from ...kit.prompt_layout import PromptLayout, before_sample, causal_mask
from ..anatomy import attention_of
from .cache_layers import Shortened, lasting
from .kv_cache import Room, total


@dataclass(frozen=True, eq=False)
class Segment:
    """Segment in one forward pass: the slots, position ids and mask that its layers work with.

    Attributes:
        layout: from the slots of the segment before (or of the caller) to this one's; None where
            they are the same.
        real: `(batch, queries)` bool, False for padding and fillers; None where there are none.
        positions: `(batch, queries)` int64 position ids, `(batch, queries, planes)` of M-RoPE.
        sample: `(batch, queries)` int64, the conversation of each slot, -1 for fillers; None where
            rows hold one.
        before: what the cache of these layers knew before the pass.
        after: what it knows afterwards.
        mask: the attention mask, as the model's attention implementation wants it.
    """

    layout: PromptLayout | None
    real: Tensor | None
    positions: Tensor
    sample: Tensor | None
    before: Shortened
    after: Shortened
    mask: Tensor | None

    @property
    def counted(self) -> Tensor | None:
        """`(batch, queries)` int64 positions without gaps in each conversation; None for one.

        FlashAttention takes every other step for the seam between two conversations.
        """
        if self.sample is None:
            return None
        every = torch.ones_like(self.sample, dtype=torch.bool)
        return every.cumsum(1) - 1 - before_sample(every, self.sample)

    def check_left(self, drop: Tensor, stage: Stage) -> None:
        """Refuse to leave nothing of a conversation.

        Args:
            drop: `(batch, queries)` bool, what is left out.
            stage: what leaves it out, for the message.
        """
        real = torch.ones_like(drop) if self.real is None else self.real
        of = drop.long() * 0 if self.sample is None else self.sample.clamp(min=0)
        none = of.new_zeros(of.shape[0], int(of.max()) + 1)
        before, left = (none.scatter_add(1, of, each.long()) for each in (real, real & ~drop))
        if bool(((before > 0) & (left == 0)).any()):
            raise UnsupportedError(
                f"{shown(stage)!r} leaves nothing of a prompt, or of a conversation in a row of "
                "several, that holds visual tokens alone; keep at least 1, or put text beside them"
            )


@dataclass(frozen=True, eq=False)
class Slots:
    """Newest slots of a prompt as a segment gets them: `(batch, queries)` each.

    Attributes:
        drop: True where a visual token is dropped.
        real: False for padding; None where there is none.
        positions: position ids.
        sample: the conversation of each slot; None where rows hold one.
        gaps: whether position ids leave some out, which is no seam where `sample` is None.
        facts: facts of the layout that is left, where they are known (see `PromptLayout.facts`).
    """

    drop: Tensor | None
    real: Tensor | None
    positions: Tensor
    sample: Tensor | None = None
    gaps: bool = False
    facts: Sequence[int] | None = None


@dataclass(frozen=True, eq=False)
class Pass:
    """Forward pass of a language model, as all its segments see it.

    Attributes:
        llm: the language model.
        cache: its cache, or None.
        past: logical length of the cache before the pass; `()` int64 where nobody has waited for
            that of a static cache.
        slots: number of slots that the caller's prompt brings.
    """

    llm: nn.Module
    cache: Any
    past: int | Tensor
    slots: int


def enter(slots: Slots, before: Shortened, whole: Pass, counting: Positions, start: int) -> Segment:
    """The segment that computes `slots` without what is dropped.

    Args:
        slots: what comes in.
        before: the cache's state for these layers.
        whole: the pass.
        counting: ``"reindexed"`` moves later positions down, ``"original"`` leaves gaps.
        start: the first layer of the segment.
    """
    batch = slots.positions.shape[0]
    layout, real, positions, sample = None, slots.real, slots.positions, slots.sample
    moved: Tensor | None = None
    if slots.drop is not None:
        if counting == "reindexed":
            moves = slots.drop.cumsum(1)
            moved = moves[:, -1]
            if sample is not None:
                moves = moves - before_sample(slots.drop, sample)
            positions = positions - moves
        keep = ~slots.drop if real is None else real & ~slots.drop
        layout = PromptLayout.of(keep, sample, slots.facts)
        positions, real = layout.shorten(positions), layout.valid
        # Fillers come out as zero, so numbers travel as one more.
        sample = None if sample is None else layout.shorten(sample + 1) - 1
    queries = positions.shape[1]
    stored, offset = whole.past - before.offset, before.offset + whole.slots - queries
    room = Room.of(whole.cache, start)
    if room is None:
        assert isinstance(stored, int)
        keys = stored + queries
        valid = _join(before.valid, real, batch, stored, queries, positions.device)
    else:
        if "flash" in attention_of(whole.llm):
            raise UnsupportedError(
                "FlashAttention takes slots of a static cache that are yet to be filled for keys; "
                "use a DynamicCache, or model.set_attn_implementation('sdpa')"
            )
        keys = room.slots(offset)
        valid = _filled(before.valid, real, (batch, keys), stored, positions)
    after = before
    if layout is not None or valid is not before.valid or offset != before.offset:
        fixed = before.fixed
        if layout is not None:
            assert isinstance(stored, int)  # a pass that leaves out has waited for its length
            fixed = stored + queries - layout.tail
        after = Shortened(offset, valid, total(before.moved, moved), fixed)
    # Gaps in the positions of a prompt that has neither mask nor cache would be taken for the
    # seams between several packed sequences.
    gaps = (counting == "original" or slots.gaps) and whole.cache is None
    # Without a mask sdpa may use its fastest kernels: either all keys are there for one query, or
    # the first of them are those of the queries.
    fills = room is not None and valid is not before.valid and real is None
    alone = (valid is None or fills) and sample is None and not gaps
    first = isinstance(stored, int) and stored == 0
    unmasked = alone and (first or (room is None and queries == 1))
    mask = _mask(whole.llm, valid, positions, keys, stored, sample, unmasked)
    return Segment(layout, real, positions, sample, before, after, mask)


def _mask(
    llm: nn.Module,
    valid: Tensor | None,
    positions: Tensor,
    keys: int,
    stored: int | Tensor,
    sample: Tensor | None,
    unmasked: bool,
) -> Tensor | None:
    (batch, queries), attention = positions.shape[:2], attention_of(llm)
    if attention not in ("sdpa", "eager") and "flash" not in attention:
        raise UnsupportedError(
            f"attention implementation {attention!r} cannot run a shortened prompt; use "
            "model.set_attn_implementation('sdpa'), 'eager' or a flash one"
        )
    if sample is not None and "flash" in attention and batch > 1:
        raise UnsupportedError(
            f"attention implementation {attention!r} keeps conversations that share a row apart in "
            f"batches of one row only, got {batch} rows; flatten them into one, or use "
            "model.set_attn_implementation('sdpa')"
        )
    if attention == "sdpa" and unmasked:
        return None
    # Parameters may be offloaded (meta), so they tell the dtype only.
    like = torch.empty(0, dtype=next(llm.parameters()).dtype, device=positions.device)
    return causal_mask(valid, batch, queries, keys, attention, like, sample, stored)


def _filled(
    past: Tensor | None,
    new: Tensor | None,
    shape: tuple[int, int],
    stored: int | Tensor,
    positions: Tensor,
) -> Tensor:
    """Validity of all slots of a static layer, in place where it is known of the past.

    Slots to come count as real: masks leave them out, since they come later.
    """
    if past is None or past.shape[1] != shape[1]:
        made = torch.ones(shape, dtype=torch.bool, device=positions.device)
        past = lasting(made if past is None else made.index_copy(1, _count(past), past))
    if new is None:
        new = torch.ones(positions.shape[:2], dtype=torch.bool, device=positions.device)
    return past.index_copy_(1, stored + _count(positions), new)


def _count(columns: Tensor) -> Tensor:
    return torch.arange(columns.shape[1], device=columns.device)


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
