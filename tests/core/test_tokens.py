"""`VisualTokens`: neutral values, checks at the border, reduction."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from core.generators import groupings, plans, same_bits, slots_of, visual_tokens
from tokenprune import Plan, ShapeError, VisualTokens

FEATURES = torch.zeros(2, 3, 4)


def test_what_is_left_out_is_neutral() -> None:
    tokens = VisualTokens.of(FEATURES)
    assert tokens.mask.all()
    assert not tokens.protected.any()
    assert tokens.patches.tolist() == [[0, 1, 2]] * 2
    assert tokens.sizes.tolist() == [[1.0] * 3] * 2
    assert tokens.ids.tolist() == [0, 0]
    assert tokens.lengths == (3, 3)
    assert tokens.protected_lengths == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_of_torch_does_not_matter(dtype: torch.dtype) -> None:
    """Loaders of models change it for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert VisualTokens.of(FEATURES).sizes.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


@given(st.data())
def test_lengths_count_real_tokens(data: st.DataObject) -> None:
    tokens = data.draw(visual_tokens())
    for row in range(len(tokens.mask)):
        real, guarded = tokens.mask[row].tolist(), tokens.protected[row].tolist()
        assert tokens.lengths[row] == sum(real)
        assert tokens.protected_lengths[row] == sum(
            r and g for r, g in zip(real, guarded, strict=True)
        )


@given(st.data())
def test_reducing_takes_everything_along(data: st.DataObject) -> None:
    tokens = data.draw(visual_tokens())
    plan = data.draw(plans(tokens))
    reduced = tokens.reduce(plan)
    assert same_bits(reduced.features, plan(tokens.features))
    assert torch.equal(reduced.mask, plan.mask)
    assert reduced.lengths == plan.lengths == tuple(reduced.mask.sum(1).tolist())
    assert reduced.protected_lengths == tuple((reduced.protected & reduced.mask).sum(1).tolist())
    assert torch.equal(reduced.ids, tokens.ids)
    for row in range(len(reduced.mask)):
        slots = slots_of(plan, row)
        real = reduced.mask[row]
        assert reduced.patches[row][real].tolist() == [tokens.patches[row, i].item() for i in slots]
        assert reduced.protected[row][real].tolist() == [
            tokens.protected[row, i].item() for i in slots
        ]


@given(st.data())
def test_groups_conserve_sizes(data: st.DataObject) -> None:
    tokens = data.draw(visual_tokens())
    groups = data.draw(groupings(tokens))
    reduced = tokens.reduce(Plan.group(groups, tokens.sizes))
    kept = tokens.sizes * (groups >= 0)
    assert torch.equal(reduced.sizes.sum(1), kept.sum(1))  # small whole numbers: exact
    assert not reduced.sizes[~reduced.mask].any()


def test_counts_stay_exact_where_half_precision_would_lose_them() -> None:
    tokens = VisualTokens.of(torch.zeros(1, 257, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = Plan.group(torch.zeros(1, 257, dtype=torch.int64), tokens.sizes)
        assert tokens.reduce(plan).sizes.item() == 257
        assert (torch.ones(1, 257) @ torch.ones(257, 1)).item() != 257  # a meta-test


# ------------------------------------------------------------------------------------ errors

META = torch.zeros(2, 3, 4, device="meta")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: VisualTokens.of(torch.zeros(3, 4)),
            "features must have axes (batch tokens channels), got (3, 4)",
        ),
        (
            lambda: VisualTokens.of(FEATURES.long()),
            "features must be floating with axes (batch tokens channels), got torch.int64",
        ),
        (
            lambda: VisualTokens.of(FEATURES, mask=torch.ones(2, 3)),
            "mask must be torch.bool with axes (batch tokens) = (2, 3), got torch.float32 (2, 3)",
        ),
        (
            lambda: VisualTokens.of(FEATURES, mask=torch.ones(3, dtype=torch.bool)),
            "got torch.bool (3,)",
        ),
        (
            lambda: VisualTokens.of(FEATURES, patches=torch.zeros(2, 3)),
            "patches must be torch.int64",
        ),
        (
            lambda: VisualTokens.of(FEATURES, sizes=torch.ones(2, 3, dtype=torch.float64)),
            "sizes must be torch.float32",
        ),
        (
            lambda: VisualTokens.of(FEATURES, protected=torch.zeros(2, 4, dtype=torch.bool)),
            "protected must be torch.bool with axes (batch tokens) = (2, 3), got torch.bool (2, 4)",
        ),
        (
            lambda: VisualTokens.of(FEATURES, ids=torch.zeros(2, 1, dtype=torch.int64)),
            "ids must be torch.int64 with axes (batch) = (2,), got torch.int64 (2, 1)",
        ),
        (
            lambda: VisualTokens.of(
                FEATURES, mask=torch.ones(2, 3, dtype=torch.bool, device="meta")
            ),
            "mask must be on cpu like the features, got meta",
        ),
        (
            lambda: VisualTokens.of(META, ids=torch.zeros(2, dtype=torch.int64)),
            "ids must be on meta like the features, got cpu",
        ),
    ],
)
def test_errors_say_what_was_expected(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ShapeError) as caught:
        make()
    assert words in str(caught.value)


def test_tokens_are_where_their_features_are() -> None:
    tokens = VisualTokens.of(META)
    fields: list[Tensor] = [tokens.mask, tokens.patches, tokens.sizes, tokens.protected]
    assert {field.device.type for field in [*fields, tokens.ids]} == {"meta"}
    assert tokens.lengths == (3, 3)  # known without asking the device
