"""Memberships of merged tokens are the matrix that they stand for, and never build it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from core.generators import plans, shared, visual_tokens
from tokenprune import Plan, PlanError, ShapeError, VisualTokens
from tokenprune.memberships import Memberships, _segment_sums

INF = math.inf


@given(st.data())
def test_sums_are_those_of_the_matrix(data: st.DataObject) -> None:
    tokens = data.draw(visual_tokens(dtypes=(torch.float64,)))
    plan = data.draw(plans(tokens))
    kept, members = plan.anchors.shape[1], plan._memberships()
    x = torch.randn(*tokens.mask.shape, 3, generator=torch.Generator().manual_seed(0)).double()
    matrix = members.dense(plan.tokens, kept)
    assert torch.equal(matrix, plan.dense())
    assert torch.allclose(members.add_up(x, kept), matrix.double() @ x)
    assert torch.equal(members.counts(kept), (matrix != 0).sum(2))
    assert torch.equal(plan.counts(), (matrix != 0).sum(2))
    of = torch.where(matrix != 0, tokens.sizes[:, None], 0).sum(2)
    assert torch.allclose(members.sizes(tokens.sizes, kept), of)
    own = matrix.gather(2, plan.anchors[:, :, None]).squeeze(2)
    assert torch.equal(members.share_of(plan.anchors)[plan.mask], own[plan.mask])


@given(st.data())
def test_every_form_gives_the_same_sums(data: st.DataObject) -> None:
    """On a GPU sums run over sorted entries; on a CPU, groups are summed slot by slot."""
    tokens = data.draw(visual_tokens(dtypes=(torch.float32,)))
    plan = data.draw(plans(tokens))
    kept, plain = plan.anchors.shape[1], plan._memberships()
    entries = Memberships(plain.goals, plain.shares, plain._slots())
    x = torch.randn(*tokens.mask.shape, 3, generator=torch.Generator().manual_seed(0))
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, expected = entries.add_up(one, kept), plain.add_up(other, kept)
    torch.testing.assert_close(got, expected)
    if kept and plan.tokens:
        got.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(one.grad, other.grad)
    assert torch.equal(entries.share_of(plan.anchors), plain.share_of(plan.anchors))
    assert torch.equal(entries.owners(plan.tokens), plain.owners(plan.tokens))


@pytest.mark.parametrize("value", [INF, -INF, math.nan])
def test_what_is_no_member_reaches_nothing(value: float) -> None:
    weights = torch.tensor([[[1.0, 0.5, 0.0], [0.0, 0.5, 0.5]]])
    plan = Plan.of_weights(torch.tensor([[0, 2]]), torch.ones(1, 2, dtype=torch.bool), weights)
    x = torch.tensor([[[value], [2.0], [4.0]]])
    first, second = plan(x).flatten().tolist()
    assert first == value or math.isnan(first)
    assert second == 3


@given(st.data())
def test_plans_one_after_the_other_are_the_product_of_their_matrices(data: st.DataObject) -> None:
    tokens = data.draw(visual_tokens(dtypes=(torch.float64,)))
    first = data.draw(plans(tokens))
    reduced = tokens.reduce(first)
    if reduced.mask.shape[1] == 0:
        return
    second = data.draw(plans(reduced))
    both = first.then(second)
    torch.testing.assert_close(both.dense(), second.dense() @ first.dense())
    if both.members is not None and both.members.slots is not None:
        real = both.members.shares != 0
        pairs = both.members.slots * 1000 + both.members.goals
        for row in range(len(real)):  # a slot is once part of a kept token
            assert len(pairs[row][real[row]].unique()) == int(real[row].sum())


@given(st.data())
def test_rows_of_several_plans_are_put_together(data: st.DataObject) -> None:
    some = [data.draw(visual_tokens(dtypes=(torch.float32,))) for _ in range(3)]
    parts = [data.draw(plans(tokens)) for tokens in some]
    whole, start = Plan.concatenated(parts), 0
    for part in parts:
        batch, kept = part.anchors.shape
        rows = whole.take_rows(range(start, start + batch))
        dense = rows.dense()
        assert torch.equal(dense[:, :kept, : part.tokens], part.dense())
        assert not dense[:, kept:].any()
        assert not dense[:, :, part.tokens :].any()
        assert torch.equal(rows.source()[:, : part.tokens], part.source())
        assert rows.lengths == part.lengths
        start += batch


class _Largest(TorchDispatchMode):
    """The most elements that a tensor has, of all that are made."""

    most = 0

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func: Callable[..., object], types: object, args=(), kwargs=None
    ) -> object:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, Tensor):
                self.most = max(self.most, each.numel())
        return made


@pytest.mark.parametrize("kind", ["group", "share"])
def test_no_matrix_is_made(kind: str) -> None:
    """Of 4,000 slots and 1,000 kept tokens: nothing of their product's size, whatever is asked."""
    tokens = VisualTokens.of(torch.rand(2, 4000, 2))
    groups = (torch.arange(4000) % 1000).expand(2, -1)
    plan = Plan.group(groups, tokens.sizes)
    if kind == "share":
        assert plan.members is not None
        slots = torch.cat([torch.arange(4000), torch.arange(4000).flip(0)]).expand(2, -1)
        shares = torch.full((2, 8000), 0.5)
        members = Memberships(torch.cat([groups, groups], 1), shares, slots)
        plan = Plan(plan.anchors, plan.mask, 4000, members, plan.lengths)
    half = Plan.group((torch.arange(1000) % 500).expand(2, -1), torch.ones(2, 1000))
    with _Largest() as seen:
        tokens.reduce(plan)
        plan.source()
        plan.counts()
        plan.then(half)(tokens.features)
        plan.then(Plan.select(torch.arange(1000).expand(2, -1) % 2 == 0))(tokens.features)
        Plan.concatenated([plan, plan]).take_rows([0, 3])
    assert seen.most <= 2 * 8000 * 3
    with _Largest() as seen:
        plan.dense()
    assert seen.most >= 2 * 1000 * 4000


def test_sums_over_segments_are_in_the_order_of_their_entries() -> None:
    """1e8 + 1 - 1e8 is 0 in float32, and 1 in any order that adds the large ones first."""
    x = torch.tensor([[[1e8], [1.0], [-1e8]]])
    index, ones = torch.arange(3)[None], torch.ones(1, 3)
    assert _segment_sums(x, index, ones, torch.zeros(3).long(), 1).item() == 0


YES = torch.ones(1, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("anchors", "words"),
    [
        ([[2, 1]], "anchors must increase where mask is True, got [[2, 1]]"),
        ([[1, 1]], "anchors must increase"),
        ([[0, 3]], "anchors must be slots in [0, 3), got [3]"),
        ([[-1, 2]], "got [-1]"),
    ],
)
def test_anchors_out_of_order_are_refused(anchors: list[list[int]], words: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan(torch.tensor(anchors), YES, 3)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("members", "error", "words"),
    [
        (Memberships(torch.tensor([[0, 1, 2]]), torch.ones(1, 3)), PlanError, "got [2]"),
        (Memberships(torch.tensor([[0, -2, 1]]), torch.ones(1, 3)), PlanError, "got [-2]"),
        (
            Memberships(torch.zeros(1, 2).long(), torch.ones(1, 2), torch.tensor([[0, 3]])),
            PlanError,
            "members must be of slots in [0, 3), got [3]",
        ),
        (Memberships(torch.zeros(1, 2).long(), torch.ones(1, 2)), ShapeError, "= (1, 3), got"),
        (Memberships(torch.zeros(1, 3), torch.ones(1, 3)), ShapeError, "goals must be torch.int64"),
        (Memberships(torch.zeros(1, 3).long(), torch.ones(1, 3).double()), ShapeError, "shares"),
    ],
)
def test_members_that_do_not_fit_are_refused(
    members: Memberships, error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as caught:
        Plan(torch.tensor([[0, 2]]), YES, 3, members)
    assert words in str(caught.value)


def test_a_generated_plan_has_slots_in_several_tokens() -> None:
    """A meta-test: the third kind that `plans` draws is what it says."""
    kept = Plan.select(torch.ones(1, 9, dtype=torch.bool))
    plan = shared(kept, torch.ones(1, 9, dtype=torch.bool), 0)
    assert int((plan.dense() != 0).sum(1).max()) > 1
