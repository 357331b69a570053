"""Layouts, masks and marks: pure tensor functions, tried on every small prompt there could be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tokenprune import Plan
from tokenprune_adapters.kit.carry import carried, carry
from tokenprune_adapters.kit.fingerprint import fingerprint
from tokenprune_adapters.kit.marks import marked, spread
from tokenprune_adapters.kit.prompt_layout import PromptLayout, causal_mask


@st.composite
def keeps(draw: st.DrawFn) -> Tensor:
    """`(batch, logical)` bool, with rows that keep all or nothing among them."""
    batch, logical = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    row = st.one_of(
        st.lists(st.booleans(), min_size=logical, max_size=logical),
        st.sampled_from([[True] * logical, [False] * logical]),
    )
    return torch.tensor([draw(row) for _ in range(batch)])


@given(keeps())
def test_a_layout_computes_the_kept_slots_in_order(keep: Tensor) -> None:
    layout = PromptLayout.of(keep)
    widest = max(int(keep.sum(1).max()), 1)
    assert layout.index.shape == (len(keep), widest)
    valid = layout.valid
    if valid is None:
        assert (keep.sum(1) == widest).all()
        valid = torch.ones_like(layout.index, dtype=torch.bool)
    for row in range(len(keep)):
        kept = keep[row].nonzero()[:, 0].tolist()
        assert layout.index[row][valid[row]].tolist() == kept
        assert valid[row].tolist() == [False] * (widest - len(kept)) + [True] * len(kept)


@given(keeps())
def test_shortening_and_restoring(keep: Tensor) -> None:
    layout = PromptLayout.of(keep)
    numbers = torch.arange(1.0, keep.numel() + 1).reshape(keep.shape)
    x = torch.stack([numbers, -numbers], dim=-1)
    poisoned = x.masked_fill(~keep[:, :, None], -torch.inf)
    short = layout.shorten(poisoned)
    assert short.isfinite().all()  # fillers are zero, whatever was there
    assert torch.equal(layout.shorten(numbers.long()), short[:, :, 0].long())
    back = layout.restore(short)
    assert torch.equal(back[keep], x[keep])
    for row, slot in (~keep).nonzero().tolist():
        before = keep[row, :slot].nonzero()[:, 0].tolist()
        if before:  # a dropped slot shows the last kept before it
            assert torch.equal(back[row, slot], x[row, before[-1]])


@given(keeps())
def test_the_tail_is_kept_by_all_rows(keep: Tensor) -> None:
    tail, logical = PromptLayout.of(keep).tail, keep.shape[1]
    assert keep[:, logical - tail :].all()
    assert tail == logical or not keep[:, logical - tail - 1].all()


@given(keeps(), st.data())
def test_a_dropped_slot_shows_nothing_of_an_earlier_conversation(
    keep: Tensor, data: st.DataObject
) -> None:
    """Neither of an earlier one, as long as its own has kept anything, nor of another row."""
    seams = data.draw(st.lists(st.booleans(), min_size=keep.numel(), max_size=keep.numel()))
    sample = torch.tensor(seams).reshape(keep.shape).cumsum(1)
    layout = PromptLayout.of(keep, sample)
    numbers = torch.arange(1, keep.numel() + 1).reshape(keep.shape)
    back = layout.restore(layout.shorten(numbers))
    assert torch.equal(back[keep], numbers[keep])
    for row, slot in (~keep).nonzero().tolist():
        own = (keep[row] & (sample[row] == sample[row, slot])).nonzero()[:, 0].tolist()
        before = [each for each in own if each < slot]
        if own:
            assert back[row, slot] == numbers[row, before[-1] if before else own[0]]
        else:
            assert back[row, slot] in [0, *numbers[row].tolist()]


@st.composite
def valids(draw: st.DrawFn) -> tuple[Tensor | None, int, int, int]:
    batch, keys = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    queries = draw(st.integers(1, keys))
    cells = st.lists(st.booleans(), min_size=keys, max_size=keys)
    valid = draw(st.none() | st.lists(cells, min_size=batch, max_size=batch))
    return (None if valid is None else torch.tensor(valid)), batch, queries, keys


@given(valids())
def test_causal_masks(case: tuple[Tensor | None, int, int, int]) -> None:
    valid, batch, queries, keys = case
    like = torch.zeros(1, dtype=torch.float16)
    sdpa = causal_mask(valid, batch, queries, keys, "sdpa", like)
    eager = causal_mask(valid, batch, queries, keys, "eager", like)
    assert sdpa is not None
    assert eager is not None
    assert sdpa.shape == eager.shape == (batch, 1, queries, keys)
    assert sdpa.dtype == torch.bool
    assert eager.dtype == torch.float16
    assert torch.equal(eager == 0, sdpa)
    assert (eager[~sdpa] == torch.finfo(torch.float16).min).all()
    assert sdpa.any(-1).all()  # a query that sees nothing is NaN in some kernels
    for row in range(batch):
        for query in range(queries):
            own = keys - queries + query
            for key in range(keys):
                real = valid is None or bool(valid[row, key])
                assert bool(sdpa[row, 0, query, key]) == (key == own or (key < own and real))
    flash = causal_mask(valid, batch, queries, keys, "flash_attention_2", like)
    assert flash is valid


def _spread(projected: Tensor, plan: Plan) -> Tensor:
    """Where every row of the plan is one image."""
    images = len(plan.anchors)
    index = plan.anchors + torch.arange(images)[:, None] * plan.tokens
    return spread(projected, index, plan.mask, (images, plan.tokens))


@given(keeps(), st.integers(1, 3))
def test_marks_stand_where_tokens_were_dropped(keep: Tensor, channels: int) -> None:
    plan = Plan.select(keep)
    kept = plan.anchors.shape[1]
    projected = torch.randn(len(keep), kept, channels, generator=torch.Generator().manual_seed(0))
    features = _spread(projected, plan)
    assert features.shape == (*keep.shape, channels)
    assert torch.equal(marked(features), ~keep)
    assert torch.equal(plan(features), projected.masked_fill(~plan.mask[:, :, None], 0))


def test_marks_of_merged_tokens_stand_at_their_anchors() -> None:
    groups = torch.tensor([[4, 1, 4, 1, 2]])
    plan = Plan.group(groups, torch.ones(1, 5))
    features = _spread(torch.tensor([[[1.0], [2.0], [3.0]]]), plan)
    assert features[0, :, 0].tolist() == [1.0, 2.0, -torch.inf, -torch.inf, 3.0]


def test_what_is_carried_stays_on_its_tensor() -> None:
    tensor = torch.randn(2, 3, requires_grad=True)
    alias = carry(tensor, "value")
    assert carried(alias) == "value"
    assert carried(tensor) is carried(alias + 1) is carried(None) is None
    assert alias.data_ptr() == tensor.data_ptr()
    alias.sum().backward()
    assert tensor.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_fingerprint_tells_pictures_apart_and_nothing_else(dtype: torch.dtype) -> None:
    pixels = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    prints = fingerprint(pixels)
    assert len(set(prints.tolist())) == 5
    assert torch.equal(fingerprint(pixels[3:4]), prints[3:4])
    assert torch.equal(fingerprint(pixels.clone(memory_format=torch.channels_last)), prints)
    moved = pixels[:1].roll(1, dims=-1)
    assert fingerprint(moved).item() != prints[0].item()
