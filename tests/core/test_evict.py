"""`Evict` against a plain loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from core.generators import (
    INF,
    NAN,
    budgets,
    kept_slots,
    same_bits,
    scored_tokens,
    slots_of,
)
from tokenprune import Evict, Keep, Plan, Reducer, Signals, VisualTokens
from tokenprune.errors import PlanError


def evicted(tokens: VisualTokens, scores: Tensor, reducer: Reducer) -> list[list[int]]:
    plan = reducer.plan(tokens, scores, Signals())
    return [slots_of(plan, row) for row in range(len(tokens.mask))]


def check_against_the_loop(
    tokens: VisualTokens, scores: Tensor, keep: Keep, reducer: Reducer
) -> None:
    plan = reducer.plan(tokens, scores, Signals())
    assert plan.members is None
    reduced = tokens.reduce(plan)
    for row in range(len(tokens.mask)):
        expected = kept_slots(
            scores[row].tolist(),
            tokens.mask[row].tolist(),
            tokens.protected[row].tolist(),
            keep.amount,
        )
        assert slots_of(plan, row) == expected
        assert plan.lengths[row] == len(expected)
        assert same_bits(reduced.features[row][reduced.mask[row]], tokens.features[row][expected])


@given(scored_tokens(), budgets())
def test_evict_is_the_loop(case: tuple[VisualTokens, Tensor], keep: Keep) -> None:
    check_against_the_loop(*case, keep, Evict(keep))


@given(scored_tokens(protected=False, padded=False), budgets())
def test_evict_is_the_loop_on_whole_rows(case: tuple[VisualTokens, Tensor], keep: Keep) -> None:
    check_against_the_loop(*case, keep, Evict(keep))


@given(scored_tokens(), st.integers(0, 9))
def test_kept_sets_are_nested_in_the_budget(case: tuple[VisualTokens, Tensor], budget: int) -> None:
    tokens, scores = case
    fewer, more = (evicted(tokens, scores, Evict(b)) for b in (budget, budget + 1))
    for few, many in zip(fewer, more, strict=True):
        assert set(few) <= set(many)


@given(scored_tokens(), budgets())
def test_no_dropped_score_is_higher_than_a_kept_one(
    case: tuple[VisualTokens, Tensor], keep: Keep
) -> None:
    tokens, scores = case
    for row, slots in enumerate(evicted(tokens, scores, Evict(keep))):
        free = tokens.mask[row] & ~tokens.protected[row]
        kept = [scores[row, i].item() for i in slots if free[i]]
        dropped = [scores[row, i].item() for i in range(len(free)) if free[i] and i not in slots]
        assert not kept or not dropped or min(kept) >= max(dropped)


@given(scored_tokens(), budgets())
def test_a_row_is_alone_in_its_batch(case: tuple[VisualTokens, Tensor], keep: Keep) -> None:
    tokens, scores = case
    together = evicted(tokens, scores, Evict(keep))
    for row in range(len(together)):
        one = slice(row, row + 1)
        single = VisualTokens.of(
            tokens.features[one], mask=tokens.mask[one], protected=tokens.protected[one]
        )
        assert evicted(single, scores[one], Evict(keep)) == [together[row]]


@given(scored_tokens(padded=False), budgets(), st.integers(0, 3), st.integers(0, 3))
def test_padding_changes_nothing(
    case: tuple[VisualTokens, Tensor], keep: Keep, left: int, right: int
) -> None:
    tokens, scores = case
    pad = (left, right)
    padded = VisualTokens.of(
        torch.nn.functional.pad(tokens.features, (0, 0, *pad), value=NAN),
        mask=torch.nn.functional.pad(tokens.mask, pad, value=False),
        protected=torch.nn.functional.pad(tokens.protected, pad, value=True),
    )
    high = torch.nn.functional.pad(scores, pad, value=INF)  # padding that scores the highest
    shifted = [[i + left for i in row] for row in evicted(tokens, scores, Evict(keep))]
    assert evicted(padded, high, Evict(keep)) == shifted


@given(scored_tokens())
def test_keeping_everything_is_the_identity_bit_for_bit(case: tuple[VisualTokens, Tensor]) -> None:
    tokens, scores = case
    for keep in (1.0, 8, 10**9):
        plan = Evict(keep).plan(tokens, scores, Signals())
        for row, real in enumerate(tokens.mask):
            assert slots_of(plan, row) == real.nonzero().flatten().tolist()
        if tokens.mask.all():
            assert plan.is_identity


def test_protected_tokens_come_first_and_count() -> None:
    tokens = VisualTokens.of(
        torch.zeros(1, 5, 1), protected=torch.tensor([[False, False, True, False, True]])
    )
    scores = torch.tensor([[9.0, 8.0, -INF, 7.0, -INF]])
    assert evicted(tokens, scores, Evict(3)) == [[0, 2, 4]]
    assert evicted(tokens, scores, Evict(1)) == [[2, 4]]  # more of them than the budget
    assert evicted(tokens, scores, Evict(0)) == [[2, 4]]


def test_ties_go_to_the_lowest_index_at_any_size() -> None:
    """Unstable sorts fail this from some tens of equal scores on."""
    tokens = VisualTokens.of(torch.zeros(1, 576, 1))
    assert evicted(tokens, torch.zeros(1, 576), Evict(8)) == [list(range(8))]
    two = torch.tensor([[0.0, 1.0] * 288])
    assert evicted(tokens, two, Evict(290)) == [sorted([0, 2, *range(1, 576, 2)])]


def test_budgets_of_ragged_rows_are_their_own() -> None:
    mask = torch.tensor([[True] * 4, [False, False, True, True], [False] * 4])
    tokens = VisualTokens.of(torch.zeros(3, 4, 1), mask=mask)
    scores = torch.tensor([[1.0, 2, 3, 4]] * 3)
    assert evicted(tokens, scores, Evict(0.5)) == [[2, 3], [3], []]
    assert evicted(tokens, scores, Evict(3)) == [[1, 2, 3], [2, 3], []]


# ------------------------------------------------------------------- the check above can fail


class _Wrong(Evict):
    """Faults of real code, each of which the loop must notice."""

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        assert scores is not None
        return self.wrongly(tokens, scores)

    def wrongly(self, tokens: VisualTokens, scores: Tensor) -> Plan:
        raise NotImplementedError


class LowestScores(_Wrong):
    def wrongly(self, tokens: VisualTokens, scores: Tensor) -> Plan:
        return Evict(self.keep).plan(tokens, -scores, Signals())


class LastOnTies(_Wrong):
    def wrongly(self, tokens: VisualTokens, scores: Tensor) -> Plan:
        back = VisualTokens.of(
            tokens.features.flip(1), mask=tokens.mask.flip(1), protected=tokens.protected.flip(1)
        )
        plan = Evict(self.keep).plan(back, scores.flip(1), Signals())
        return Plan.select((plan.source() >= 0).flip(1))


class FirstRowForAll(_Wrong):
    def wrongly(self, tokens: VisualTokens, scores: Tensor) -> Plan:
        return Evict(self.keep).plan(tokens, scores[:1].expand_as(scores), Signals())


class ForgetsProtected(_Wrong):
    def wrongly(self, tokens: VisualTokens, scores: Tensor) -> Plan:
        return Evict(self.keep).plan(
            VisualTokens.of(tokens.features, mask=tokens.mask), scores, Signals()
        )


class ForgetsPadding(_Wrong):
    def wrongly(self, tokens: VisualTokens, scores: Tensor) -> Plan:
        return Evict(self.keep).plan(
            VisualTokens.of(tokens.features, protected=tokens.protected),
            scores.nan_to_num(posinf=INF, neginf=-INF),
            Signals(),
        )


class OrderOfScores(_Wrong):
    def wrongly(self, tokens: VisualTokens, scores: Tensor) -> Plan:
        plan = Evict(self.keep).plan(tokens, scores, Signals())
        return Plan(plan.anchors.flip(1), plan.mask.flip(1), plan.tokens)


@pytest.mark.parametrize(
    "wrong",
    [LowestScores, LastOnTies, FirstRowForAll, ForgetsProtected, ForgetsPadding, OrderOfScores],
)
def test_wrong_evictions_are_noticed(wrong: type[Evict]) -> None:
    @settings(phases=[Phase.generate])  # to be found is enough, it need not be made small
    @given(scored_tokens(), budgets())
    def property_of_evict(case: tuple[VisualTokens, Tensor], keep: Keep) -> None:
        check_against_the_loop(*case, keep, wrong(keep))

    with pytest.raises((AssertionError, PlanError)):
        property_of_evict()
