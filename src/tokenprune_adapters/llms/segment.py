"""A segment: decoder layers in a row that compute the same tokens of a prompt.

Without anything reduced there is one segment, the whole model. A reduction before the LLM shortens
that one; each reduction after a layer starts another, which has its own slots, validity, positions,
attention mask and cache state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedError
from tokenprune.placement import Positions

from ..hf.anatomy import attention_of
from ..layout import Layout, causal_mask
from .cache import Shortened


@dataclass(frozen=True, eq=False)
class Segment:
    """What the layers of one segment work with during one forward pass.

    Attributes:
        layout: from the slots of the segment before (or of the caller) to this one's; None where
            they are the same.
        real: `(batch, queries)` bool, False for padding and fillers; None where there are none.
        place: `(batch, queries)` int64 position ids.
        before: what the cache of these layers knew before the pass.
        after: what it knows afterwards.
        mask: the attention mask, as the model's attention implementation wants it.
    """

    layout: Layout | None
    real: Tensor | None
    place: Tensor
    before: Shortened
    after: Shortened
    mask: Tensor | None


@dataclass(frozen=True, eq=False)
class Slots:
    """The newest slots of a prompt as a segment gets them: `(batch, queries)` each.

    Attributes:
        drop: True where a visual token is dropped.
        real: False for padding; None where there is none.
        place: position ids.
    """

    drop: Tensor | None
    real: Tensor | None
    place: Tensor


def enter(
    slots: Slots, before: Shortened, past: int, positions: Positions, llm: nn.Module, cached: bool
) -> Segment:
    """The segment that computes `slots` without what is dropped.

    Args:
        slots: what comes in.
        before: the cache's state for these layers.
        past: logical length of the cache.
        positions: ``"reindexed"`` moves later positions down, ``"original"`` leaves gaps.
        llm: the language model.
        cached: whether the pass has a cache.
    """
    batch, logical = slots.place.shape
    layout, real, place = None, slots.real, slots.place
    moved = torch.zeros(batch, dtype=torch.int64, device=place.device)
    if slots.drop is not None:
        if positions == "reindexed":
            moves = slots.drop.cumsum(1)
            place, moved = place - moves, moves[:, -1]
        layout = Layout.of(~slots.drop if real is None else real & ~slots.drop)
        place, real = layout.shorten(place), layout.valid
    queries, stored = place.shape[1], past - before.offset
    valid = _join(before.valid, real, batch, stored, queries, place.device)
    after = Shortened(
        before.offset + logical - queries,
        valid,
        before.moved + moved,
        before.tail + queries if layout is None else layout.tail,
    )
    # Gaps in the positions of a prompt that has neither mask nor cache would be taken for the
    # seams between several packed sequences.
    gaps = positions == "original" and not cached
    mask = _mask(llm, valid, batch, queries, stored + queries, gaps, place.device)
    return Segment(layout, real, place, before, after, mask)


def _mask(
    llm: nn.Module,
    valid: Tensor | None,
    batch: int,
    queries: int,
    keys: int,
    gaps: bool,
    device: torch.device,
) -> Tensor | None:
    attention = attention_of(llm)
    if attention not in ("sdpa", "eager") and "flash" not in attention:
        raise UnsupportedError(
            f"attention implementation {attention!r} cannot run a shortened prompt; use "
            "model.set_attn_implementation('sdpa'), 'eager' or a flash one"
        )
    # Without a mask sdpa may use its fastest kernels.
    if attention == "sdpa" and valid is None and queries in (1, keys) and not gaps:
        return None
    # Parameters may be offloaded (meta), so they tell the dtype only.
    like = torch.empty(0, dtype=next(llm.parameters()).dtype, device=device)
    return causal_mask(valid, batch, queries, keys, attention, like)


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
