"""`Plan`: order, masks, padding, bits, weights and composition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from core.generators import (
    FLOATING,
    INF,
    NAN,
    WHOLE,
    groupings,
    plans,
    same_bits,
    slots_of,
    visual_tokens,
)
from tokenprune import Plan, ShapeError, VisualTokens


def mixed_by_hand(plan: Plan, x: Tensor) -> Tensor:
    """The plan as loops in float64, over members alone."""
    batch, kept = plan.anchors.shape
    out = torch.zeros(batch, kept, *x.shape[2:], dtype=torch.float64)
    dense = plan.dense()
    for row in range(batch):
        for slot in range(kept):
            for token in range(plan.tokens):
                weight = dense[row, slot, token].item()
                if weight != 0:
                    out[row, slot] += weight * x[row, token].double()
    return out


def check_structure(plan: Plan) -> None:
    """Anchors ascend among real slots, real slots come first, lengths agree with the mask."""
    for row in range(len(plan.anchors)):
        slots = slots_of(plan, row)
        assert slots == sorted(set(slots))
        assert all(0 <= slot < plan.tokens for slot in slots)
        assert plan.mask[row].tolist() == [k < len(slots) for k in range(plan.anchors.shape[1])]
        assert plan.lengths[row] == len(slots)
    assert plan.anchors.shape[1] == max(plan.lengths, default=0)
    assert ((plan.anchors >= 0) & (plan.anchors < max(plan.tokens, 1))).all()


# ---------------------------------------------------------------------------- selections


@given(st.data())
def test_select_keeps_the_marked_slots_in_order(data: st.DataObject) -> None:
    keep = data.draw(visual_tokens()).mask
    plan = Plan.select(keep)
    check_structure(plan)
    for row in range(len(keep)):
        assert slots_of(plan, row) == [i for i, marked in enumerate(keep[row].tolist()) if marked]
    assert plan.members is None


@given(st.data())
def test_select_agrees_with_and_without_known_lengths(data: st.DataObject) -> None:
    keep = data.draw(visual_tokens()).mask
    lengths = tuple(keep.sum(1).tolist())
    known, asked = Plan.select(keep, lengths), Plan.select(keep)
    assert known.lengths == asked.lengths
    assert torch.equal(known.anchors, asked.anchors)
    assert torch.equal(known.mask, asked.mask)


@pytest.mark.parametrize("dtype", FLOATING + WHOLE, ids=str)
@given(data=st.data())
def test_selections_copy_bits(dtype: torch.dtype, data: st.DataObject) -> None:
    keep = data.draw(visual_tokens()).mask
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    shape = (*keep.shape, *data.draw(st.sampled_from([(), (3,), (2, 2)])))
    if dtype.is_floating_point:  # every bit pattern, NaN with payloads among them
        size = torch.finfo(dtype).bits // 8
        raw = torch.randint(0, 256, (*shape, size), generator=generator, dtype=torch.uint8)
        x = raw.view(dtype).squeeze(-1)
    else:
        x = torch.randint(0, 2, shape, generator=generator).to(dtype)
    plan = Plan.select(keep)
    out = plan(x)
    assert out.dtype == dtype
    for row in range(len(keep)):
        assert same_bits(out[row][plan.mask[row]], x[row][keep[row]])
        assert not out[row][~plan.mask[row]].to(torch.float64).any()  # fillers are zero


def test_a_plan_takes_views_that_are_not_contiguous() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4).transpose(1, 2)
    keep = torch.tensor([[True, False, True, False], [False, True, False, False]])
    out = Plan.select(keep)(x)
    assert torch.equal(out[0], x[0, [0, 2]])
    assert torch.equal(out[1, 0], x[1, 1])
    assert not out[1, 1].any()


def test_identity_is_noticed_and_a_padded_row_is_not_an_identity() -> None:
    whole = torch.ones(2, 3, dtype=torch.bool)
    assert Plan.identity(whole).is_identity
    assert Plan.of_indices(torch.tensor([[0, 1, 2]]), 3).is_identity
    padded = torch.tensor([[True, True, False]])
    assert not Plan.identity(padded).is_identity
    assert not Plan.group(torch.tensor([[0, 1, 2]]), torch.ones(1, 3)).is_identity


def test_rows_without_a_token_and_batches_without_a_row() -> None:
    nothing = Plan.select(torch.zeros(2, 3, dtype=torch.bool))
    assert nothing(torch.ones(2, 3, 5)).shape == (2, 0, 5)
    assert nothing.source().tolist() == [[-1, -1, -1]] * 2
    assert nothing.dense().shape == (2, 0, 3)
    no_rows = Plan.select(torch.zeros(0, 3, dtype=torch.bool))
    assert no_rows(torch.ones(0, 3, 5)).shape == (0, 0, 5)
    assert no_rows.lengths == ()


# -------------------------------------------------------------------------------- groups


@given(st.data())
def test_groups_stand_at_their_smallest_member_and_weigh_by_size(data: st.DataObject) -> None:
    tokens = data.draw(visual_tokens())
    groups = data.draw(groupings(tokens))
    plan = Plan.group(groups, tokens.sizes)
    check_structure(plan)
    for row, numbers in enumerate(groups.tolist()):
        members: dict[int, list[int]] = {}
        for slot, number in enumerate(numbers):
            if number >= 0:
                members.setdefault(number, []).append(slot)
        expected = sorted(members.values())  # by smallest member
        assert slots_of(plan, row) == [group[0] for group in expected]
        for slot, group in enumerate(expected):
            mass = sum(tokens.sizes[row, i].item() for i in group)
            for token in range(plan.tokens):
                weight = tokens.sizes[row, token].item() / mass if token in group else 0.0
                assert math.isclose(plan.dense()[row, slot, token].item(), weight, rel_tol=1e-6)
        sources = {token: slot for slot, group in enumerate(expected) for token in group}
        assert plan.source()[row].tolist() == [sources.get(i, -1) for i in range(plan.tokens)]
    assert torch.allclose(plan.dense().sum(-1), plan.mask.float())


@given(st.data())
def test_which_numbers_name_the_groups_does_not_matter(data: st.DataObject) -> None:
    tokens = data.draw(visual_tokens())
    groups = data.draw(groupings(tokens))
    names = torch.tensor(data.draw(st.permutations(range(groups.shape[1]))))
    renamed = torch.where(groups < 0, groups, names[groups.clamp(min=0)])
    plan, other = Plan.group(groups, tokens.sizes), Plan.group(renamed, tokens.sizes)
    assert torch.equal(plan.anchors, other.anchors)
    assert torch.equal(plan.dense(), other.dense())


@given(st.data())
def test_merges_accumulate_in_float32_and_return_the_dtype(data: st.DataObject) -> None:
    tokens = data.draw(visual_tokens())
    plan = data.draw(plans(tokens))
    out = plan(tokens.features)
    assert out.dtype == tokens.features.dtype
    exact = mixed_by_hand(plan, tokens.features)
    # Half a step of the dtype, and float32's error in the weights and the sum.
    step = torch.finfo(out.dtype).eps / 2 + 1e-6
    worst = tokens.features.double().abs().amax(1, keepdim=True)
    assert ((out.double() - exact).abs() <= step * exact.abs() + 1e-6 * worst + 1e-7).all()


def test_merging_half_precision_would_go_wrong_without_float32() -> None:
    """A meta-test: the sum of 40 numbers of 60,000 overflows fp16, and bf16 loses ones."""
    plan = Plan.group(torch.zeros(1, 40, dtype=torch.int64), torch.ones(1, 40))
    assert plan(torch.full((1, 40, 1), 6e4, dtype=torch.float16)).item() == 6e4
    assert torch.full((40,), 6e4, dtype=torch.float16).cumsum(0)[-1].isinf()
    cancel = Plan.group(torch.tensor([[0, 0]]), torch.tensor([[1.0, 9.0]]))
    nines = torch.tensor([[[9.0], [-1.0]]], dtype=torch.bfloat16)
    assert cancel(nines).abs().item() < 1e-6
    assert (cancel.dense().bfloat16() @ nines).abs().item() > 1e-3
    x = torch.tensor([256.0] + [1.0] * 255, dtype=torch.bfloat16)[None, :, None]
    many = Plan.group(torch.zeros(1, 256, dtype=torch.int64), torch.ones(1, 256))
    assert many(x).item() == torch.tensor(511 / 256).bfloat16().item()


@given(st.data())
def test_tokens_that_merge_with_nobody_keep_their_bits(data: st.DataObject) -> None:
    tokens = data.draw(visual_tokens())
    groups = data.draw(groupings(tokens))
    plan = Plan.group(groups, tokens.sizes)
    raw = torch.randint(0, 256, (*groups.shape, 2), dtype=torch.uint8, generator=_seeded(data))
    x = raw.view(torch.bfloat16)  # NaN and infinities too
    out = plan(x)
    for row in range(len(groups)):
        for slot, anchor in enumerate(slots_of(plan, row)):
            if (groups[row] == groups[row, anchor]).sum() == 1:
                assert same_bits(out[row, slot], x[row, anchor])


@given(st.data())
def test_integers_and_bools_are_taken_at_the_anchors(data: st.DataObject) -> None:
    tokens = data.draw(visual_tokens())
    plan = data.draw(plans(tokens))
    for x in (tokens.patches + 5, tokens.protected):
        out = plan(x)
        assert out.dtype == x.dtype
        for row in range(len(x)):
            assert out[row][plan.mask[row]].tolist() == [
                x[row, i].item() for i in slots_of(plan, row)
            ]
            assert not out[row][~plan.mask[row]].any()


# ------------------------------------------------------------- inf and NaN stay where they are


@given(st.data())
def test_what_is_not_a_member_never_reaches_a_kept_token(data: st.DataObject) -> None:
    """Neither dropped tokens, nor padding, nor the members of another group."""
    tokens = data.draw(visual_tokens())
    plan = data.draw(plans(tokens))
    poison = data.draw(st.sampled_from([INF, -INF, NAN]))
    victim = data.draw(st.integers(0, plan.tokens - 1))
    clean = plan(tokens.features)
    poisoned = tokens.features.clone()
    poisoned[:, victim] = poison
    out = plan(poisoned)
    for row in range(len(clean)):
        for slot in range(clean.shape[1]):
            if plan.dense()[row, slot, victim] == 0:
                assert same_bits(out[row, slot], clean[row, slot])
            else:
                assert out[row, slot].isnan().all() or (out[row, slot] == poison).all()


def test_a_member_that_is_nan_makes_its_group_nan_and_no_other() -> None:
    plan = Plan.group(torch.tensor([[0, 0, 1, 1]]), torch.ones(1, 4))
    mixed = plan(torch.tensor([[[1.0], [torch.nan], [2.0], [4.0]]]))
    assert mixed[0, 0].isnan()
    assert mixed[0, 1] == 3


def test_infinite_members_mix_as_means_do() -> None:
    plan = Plan.group(torch.tensor([[0, 0, 1, 1, 2]]), torch.ones(1, 5))
    x = torch.tensor([[[INF, -INF], [1.0, 1.0], [INF, 0.0], [-INF, 0.0], [4.0, 5.0]]])
    mixed = plan(x)[0]
    assert mixed[0].tolist() == [INF, -INF]
    assert mixed[1, 0].isnan()  # the mean of inf and -inf
    assert mixed[1, 1] == 0
    assert mixed[2].tolist() == [4.0, 5.0]


def test_a_plain_matrix_product_would_leak() -> None:
    """A meta-test of the two above."""
    plan = Plan.group(torch.tensor([[0, 1, 1]]), torch.ones(1, 3))
    x = torch.tensor([[[INF], [1.0], [2.0]]])
    assert (plan.dense() @ x)[0, 1].isnan()
    assert plan(x)[0].flatten().tolist() == [INF, 1.5]


def test_a_single_member_away_from_its_anchor_is_not_mistaken_for_the_anchor() -> None:
    """A cluster may be represented by a token that stands elsewhere."""
    weights = torch.tensor([[[0.0, 0.0, 1.0]]])
    plan = Plan.of_weights(torch.tensor([[0]]), torch.ones(1, 1, dtype=torch.bool), weights)
    assert plan(torch.tensor([[[7.0], [8.0], [9.0]]])).item() == 9


# -------------------------------------------------------------------------- then, dense, source


@given(st.data())
def test_dense_is_the_plan_as_a_matrix(data: st.DataObject) -> None:
    tokens = data.draw(visual_tokens(dtypes=(torch.float32,)))
    plan = data.draw(plans(tokens))
    assert plan.dense().dtype == torch.float32
    assert torch.allclose(plan(tokens.features), plan.dense() @ tokens.features, rtol=1e-5)


@given(st.data())
def test_then_is_one_step_after_the_other(data: st.DataObject) -> None:
    tokens = data.draw(visual_tokens(dtypes=(torch.float64,)))
    first = data.draw(plans(tokens))
    reduced = tokens.reduce(first)
    if reduced.mask.shape[1] == 0:
        return
    second = data.draw(plans(reduced))
    both = first.then(second)
    check_structure(both)
    assert both.tokens == first.tokens
    assert both.lengths == second.lengths
    step_by_step = second(first(tokens.features))
    worst = tokens.features.abs().amax().item()
    assert torch.allclose(both(tokens.features), step_by_step, rtol=1e-5, atol=1e-6 * worst)
    assert torch.equal(both(tokens.patches), second(first(tokens.patches)))


@given(st.data())
def test_then_of_selections_is_a_selection_that_copies_bits(data: st.DataObject) -> None:
    tokens = data.draw(visual_tokens())
    first = Plan.select(tokens.mask & data.draw(visual_tokens_mask(tokens)))
    kept = tokens.reduce(first)
    second = Plan.select(kept.mask & data.draw(visual_tokens_mask(kept)))
    both = first.then(second)
    assert both.members is None
    assert same_bits(both(tokens.features), second(first(tokens.features)))


@given(st.data())
def test_source_and_anchors_agree(data: st.DataObject) -> None:
    tokens = data.draw(visual_tokens())
    plan = data.draw(plans(tokens))
    source = plan.source()
    assert source.dtype == torch.int64
    for row in range(len(source)):
        for slot, anchor in enumerate(slots_of(plan, row)):
            assert source[row, anchor] == slot
        for token, slot in enumerate(source[row].tolist()):
            assert (slot == -1) == (plan.dense()[row, :, token].sum() == 0)


def test_source_of_a_token_with_several_owners_is_the_heaviest_and_an_anchor_its_own() -> None:
    weights = torch.tensor([[[0.5, 0.3, 0.1], [0.5, 0.6, 0.9]]])
    plan = Plan.of_weights(torch.tensor([[0, 2]]), torch.ones(1, 2, dtype=torch.bool), weights)
    assert plan.source().tolist() == [[0, 1, 1]]


def test_an_anchor_reports_its_own_slot_though_it_weighs_more_in_another() -> None:
    """In merging plans too: PruMerge's kept tokens are neighbours of each other."""
    weights = torch.tensor([[[1.0, 5.0, 0.2, 0.0], [7.0, 1.0, 0.0, 0.3], [0.0, 0.0, 9.0, 0.0]]])
    plan = Plan.of_weights(torch.tensor([[0, 1, 3]]), torch.ones(1, 3, dtype=torch.bool), weights)
    assert plan.source().tolist() == [[0, 1, 2, 2]]  # the last weighs nothing in its own slot


def test_fillers_of_short_rows_take_no_token_from_its_slot() -> None:
    weights = torch.tensor([[[0.2, 0.8, 0.0], [0.0, 0.0, 0.0]], [[1.0, 0.0, 0.0], [0.0, 0.4, 0.6]]])
    mask = torch.tensor([[True, False], [True, True]])
    plan = Plan.of_weights(torch.tensor([[1, 0], [0, 1]]), mask, weights)
    assert plan.source().tolist() == [[0, 0, -1], [0, 1, 1]]


# ------------------------------------------------------------------------------------ errors

YES = torch.ones(1, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Plan(torch.zeros(2, dtype=torch.int64), YES, 3), "axes (batch kept)"),
        (lambda: Plan(torch.zeros(1, 3, dtype=torch.int64), YES, 3), "got (1, 3) and (1, 2)"),
        (lambda: Plan(torch.zeros(1, 2), YES, 3), "anchors must be int64 and mask bool"),
        (lambda: Plan(torch.zeros(1, 2).long(), YES.int(), 3), "got torch.int64, torch.int32"),
        (
            lambda: Plan.of_weights(torch.zeros(1, 2).long(), YES, torch.zeros(1, 3, 4)),
            "weights must be float32 with axes (batch kept tokens) = (1, 2) + (tokens,), "
            "got torch.float32 (1, 3, 4)",
        ),
        (
            lambda: Plan.of_weights(torch.zeros(1, 2).long(), YES, torch.zeros(1, 2, 3).double()),
            "got torch.float64",
        ),
        (lambda: Plan.select(torch.ones(1, 2)), "keep must be bool with axes (batch tokens)"),
        (lambda: Plan.select(torch.ones(2, dtype=torch.bool)), "got torch.bool (2,)"),
        (lambda: Plan.select(YES)(torch.ones(2, 2)), "x must have axes (batch tokens ...)"),
        (lambda: Plan.select(YES)(torch.ones(1, 3, 4)), "= (1, 2) + (...), got (1, 3, 4)"),
        (lambda: Plan.select(YES)(torch.ones(2)), "got (2,)"),
        (
            lambda: Plan.select(YES).then(Plan.select(torch.ones(1, 3, dtype=torch.bool))),
            "the plan gives 2 slots, the next was made for 3",
        ),
        (lambda: Plan.group(torch.zeros(2).long(), torch.ones(2)), "got torch.int64 (2,)"),
        (lambda: Plan.group(torch.zeros(1, 2), torch.ones(1, 2)), "groups must be int64"),
        (lambda: Plan.group(torch.zeros(1, 2).long(), torch.ones(1, 3)), "and (1, 3)"),
    ],
)
def test_errors_say_what_was_expected(make: object, words: str) -> None:
    with pytest.raises(ShapeError) as caught:
        make()  # type: ignore[operator]
    assert words in str(caught.value)
    assert isinstance(caught.value, ValueError)


# ------------------------------------------------------------------------------------ autocast


def test_autocast_changes_nothing() -> None:
    """A model often runs under autocast, which would turn matrix products into bfloat16."""
    tokens = VisualTokens.of(torch.rand(1, 300, 4, generator=torch.Generator().manual_seed(0)))
    groups = (torch.arange(300) % 3)[None]
    plan = Plan.group(groups, tokens.sizes)
    then = plan.then(Plan.group(torch.tensor([[0, 0, 1]]), torch.ones(1, 3)))
    expected = plan(tokens.features), tokens.reduce(plan).sizes, then(tokens.features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (plan.dense() @ tokens.features).dtype == torch.bfloat16  # what would happen
        again = plan.then(Plan.group(torch.tensor([[0, 0, 1]]), torch.ones(1, 3)))
        got = plan(tokens.features), tokens.reduce(plan).sizes, again(tokens.features)
    for one, other in zip(expected, got, strict=True):
        assert same_bits(one, other)


def _seeded(data: st.DataObject) -> torch.Generator:
    return torch.Generator().manual_seed(data.draw(st.integers(0, 999)))


@st.composite
def visual_tokens_mask(draw: st.DrawFn, tokens: VisualTokens) -> Tensor:
    flat = draw(st.lists(st.booleans(), min_size=(n := tokens.mask.numel()), max_size=n))
    return torch.tensor(flat, dtype=torch.bool).reshape(tokens.mask.shape)


@given(data=st.data())
def test_groups_add_up_to_what_their_matrix_gives(data: st.DataObject) -> None:
    """On a CPU groups are summed token by token; the matrix is what other devices multiply by."""
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 6))
    numbers = st.lists(st.integers(-1, tokens - 1), min_size=tokens, max_size=tokens)
    groups = torch.tensor([data.draw(numbers) for _ in range(batch)], dtype=torch.int64)
    sizes = torch.arange(batch * tokens).reshape(batch, tokens).float() % 4
    plan = Plan.group(groups.reshape(batch, tokens), sizes)
    matrix = Plan.of_weights(plan.anchors, plan.mask, plan.dense())
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    x = torch.randn(batch, tokens, 2, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    junk = data.draw(st.sampled_from([0.0, torch.inf, -torch.inf, torch.nan]))
    if tokens and junk:
        x[data.draw(st.integers(0, batch - 1)), data.draw(st.integers(0, tokens - 1)), 0] = junk
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, expected = plan(ours), matrix(theirs)
    assert got.dtype == x.dtype
    torch.testing.assert_close(got, expected, equal_nan=True)
    if not junk:
        got.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
