"""Segment: decoder layers in a row that compute the same tokens of a prompt.

Without anything reduced there is one segment, the whole model. A reduction before the LLM shortens
that one; each reduction after a layer starts another, which has its own slots, validity, positions,
attention mask and cache state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedError
from tokenprune.placement import Positions
from tokenprune.spec import shown
from tokenprune.strategy import Stage

from ...kit.prompt_layout import PromptLayout, before_sample, causal_mask
from ..anatomy import attention_of
from .kv_cache import Shortened, total


@dataclass(frozen=True, eq=False)
class Segment:
    """Segment in one forward pass: the slots, position ids and mask that its layers work with.

    Attributes:
        layout: from the slots of the segment before (or of the caller) to this one's; None where
            they are the same.
        real: `(batch, queries)` bool, False for padding and fillers; None where there are none.
        positions: `(batch, queries)` int64 position ids.
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
        of = torch.zeros_like(self.positions) if self.sample is None else self.sample.clamp(min=0)
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


def enter(
    slots: Slots, before: Shortened, past: int, counting: Positions, llm: nn.Module, cached: bool
) -> Segment:
    """The segment that computes `slots` without what is dropped.

    Args:
        slots: what comes in.
        before: the cache's state for these layers.
        past: logical length of the cache.
        counting: ``"reindexed"`` moves later positions down, ``"original"`` leaves gaps.
        llm: the language model.
        cached: whether the pass has a cache.
    """
    batch, logical = slots.positions.shape
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
    queries, stored = positions.shape[1], past - before.offset
    valid = _join(before.valid, real, batch, stored, queries, positions.device)
    after = Shortened(
        before.offset + logical - queries,
        valid,
        total(before.moved, moved),
        before.tail + queries if layout is None else layout.tail,
    )
    # Gaps in the positions of a prompt that has neither mask nor cache would be taken for the
    # seams between several packed sequences.
    gaps = (counting == "original" or slots.gaps) and not cached
    mask = _mask(llm, valid, batch, queries, stored + queries, gaps, positions.device, sample)
    return Segment(layout, real, positions, sample, before, after, mask)


def _mask(
    llm: nn.Module,
    valid: Tensor | None,
    batch: int,
    queries: int,
    keys: int,
    gaps: bool,
    device: torch.device,
    sample: Tensor | None,
) -> Tensor | None:
    attention = attention_of(llm)
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
    # Without a mask sdpa may use its fastest kernels.
    alone = valid is None and sample is None
    if attention == "sdpa" and alone and queries in (1, keys) and not gaps:
        return None
    # Parameters may be offloaded (meta), so they tell the dtype only.
    like = torch.empty(0, dtype=next(llm.parameters()).dtype, device=device)
    return causal_mask(valid, batch, queries, keys, attention, like, sample)


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
