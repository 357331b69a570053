"""`Strategy`: what may stand where, composition, and what scorers may return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import assume, given
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
    visual_tokens,
)
from tokenprune import (
    AfterLayer,
    BeforeLLM,
    BudgetError,
    ClsAttention,
    ClsAttentionScorer,
    Evict,
    Keep,
    Keys,
    MissingSignalError,
    Plan,
    RandomScorer,
    Reducer,
    ScoreError,
    Scorer,
    ShapeError,
    Signal,
    Signals,
    SpecError,
    Strategy,
    ToMe,
    UniformScorer,
    VisualTokens,
)


@dataclass(frozen=True, eq=False)
class Gives(Scorer):
    """Returns what it is given."""

    scores: Tensor

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        return self.scores


@dataclass(frozen=True)
class FromSignal(Scorer):
    """Reads one row, and remembers what it was shown."""

    seen: list[tuple[VisualTokens, Signals]] = field(default_factory=list, compare=False)

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset({ClsAttention(1)})

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        self.seen.append((tokens, signals))
        return signals[ClsAttention(1)][:, 0, 0]


@dataclass(frozen=True)
class Pairs(Reducer):
    """Merges neighbours, and remembers the scores that it was shown."""

    seen: list[Tensor | None] = field(default_factory=list, compare=False)

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset({Keys(-2)})

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        self.seen.append(scores)
        count = tokens.mask.shape[1]
        groups = (torch.arange(count) // 2).expand(tokens.mask.shape)
        return Plan.group(groups.masked_fill(~tokens.mask, -1), tokens.sizes)


def signals_of(rows: Tensor) -> Signals:
    keys = torch.zeros(len(rows), 1, rows.shape[1], 2)
    return Signals({ClsAttention(1): rows[:, None, None], Keys(-2): keys})


# -------------------------------------------------------------------------------- composition


@given(scored_tokens(), budgets())
def test_a_scorer_and_a_reducer(case: tuple[VisualTokens, Tensor], keep: Keep) -> None:
    tokens, scores = case
    reduction = Strategy(Gives(scores), Evict(keep))(tokens)
    assert reduction.scores is scores
    for row in range(len(scores)):
        kept = kept_slots(
            scores[row].tolist(),
            tokens.mask[row].tolist(),
            tokens.protected[row].tolist(),
            keep.amount,
        )
        assert slots_of(reduction.plan, row) == kept
    assert same_bits(reduction.tokens.features, tokens.reduce(reduction.plan).features)


@given(scored_tokens(), st.integers(1, 9), st.integers(0, 8))
def test_evicting_twice_is_evicting_to_the_last_budget(
    case: tuple[VisualTokens, Tensor], one: int, other: int
) -> None:
    tokens, scores = case
    assume(other < one)
    first = Strategy(Gives(scores), Evict(one))(tokens)
    second = Strategy(Gives(first.plan(scores)), Evict(other))(first.tokens)
    twice = replace(second, plan=first.plan.then(second.plan))
    once = Strategy(Gives(scores), Evict(other))(tokens)
    assert twice.tokens.lengths == once.tokens.lengths
    for row in range(len(scores)):
        assert slots_of(twice.plan, row) == slots_of(once.plan, row)
        real, same = twice.tokens.mask[row], once.tokens.mask[row]
        assert same_bits(twice.tokens.features[row][real], once.tokens.features[row][same])


@given(st.data())
def test_later_steps_see_what_earlier_ones_left(data: st.DataObject) -> None:
    tokens = data.draw(visual_tokens(protected=False, dtypes=(torch.float32,)))
    rows = torch.rand(tokens.mask.shape, generator=torch.Generator().manual_seed(3))
    first, second, pairs = FromSignal(), FromSignal(), Pairs()
    keep = data.draw(st.integers(2, 6))
    strategy = Strategy(first, Evict(keep), pairs, second, Evict(1))
    reduction = strategy(tokens, signals_of(rows))

    by_hand = Evict(keep).plan(tokens, rows, Signals())
    after_evict = tokens.reduce(by_hand)
    by_pairs = Pairs().plan(after_evict, None, Signals())
    after_pairs = after_evict.reduce(by_pairs)
    assert first.seen[0][0] is tokens
    torch.testing.assert_close(pairs.seen[0], by_hand(rows))
    seen_tokens, seen_signals = second.seen[0]
    assert same_bits(seen_tokens.features, after_pairs.features)
    assert torch.equal(seen_tokens.sizes, after_pairs.sizes)
    rows_then = by_pairs(by_hand(rows))
    torch.testing.assert_close(seen_signals[ClsAttention(1)][:, 0, 0], rows_then)
    last = Evict(1).plan(after_pairs, rows_then, Signals())
    assert same_bits(reduction.tokens.features, after_pairs.reduce(last).features)
    whole = by_hand.then(by_pairs).then(last)
    assert torch.equal(reduction.plan.dense(), whole.dense())
    assert torch.equal(reduction.plan.source(), whole.source())
    assert torch.equal(reduction.scores, rows)  # type: ignore[arg-type]


def test_one_object_may_stand_twice() -> None:
    """Equality or identity with the last step must not decide what is passed on."""
    tokens = VisualTokens.of(torch.arange(8.0)[None, :, None])
    scores = torch.tensor([[1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 4.0, 6.0]])
    half, pairs = Evict(0.5), Pairs()
    signals = signals_of(scores)
    assert slots_of(Strategy(Gives(scores), half, half)(tokens).plan, 0) == [1, 3]
    scorer = FromSignal()
    reduction = Strategy(scorer, pairs, scorer, half, pairs, scorer, half)(tokens, signals)
    assert scorer.seen[1][1][ClsAttention(1)].flatten().tolist() == [5.0, 5.0, 5.0, 5.0]
    assert scorer.seen[2][1][ClsAttention(1)].flatten().tolist() == [5.0]
    assert reduction.tokens.features.flatten().tolist() == [1.5]  # the mean of tokens 0 to 3


def test_a_reducer_may_work_without_scores() -> None:
    pairs = Pairs()
    reduction = Strategy(pairs)(VisualTokens.of(torch.ones(1, 4, 1)))
    assert pairs.seen == [None]
    assert reduction.scores is None
    assert reduction.tokens.sizes.tolist() == [[2.0, 2.0]]


def test_scores_of_a_later_scorer_are_not_those_of_the_input() -> None:
    reduction = Strategy(Pairs(), UniformScorer(), Evict(1))(VisualTokens.of(torch.ones(1, 4, 1)))
    assert reduction.scores is None
    assert reduction.plan.tokens == 4


def test_infinite_scores_merge_without_becoming_nan() -> None:
    """Legal scores stay rankable after a merge: only the members of a group count."""
    scores = torch.tensor([[INF, 0.0, 1.0, 3.0, -INF, 0.0, 2.0, 2.0]])
    reduction = Strategy(Gives(scores), Pairs(), Evict(2))(VisualTokens.of(torch.ones(1, 8, 1)))
    assert slots_of(reduction.plan, 0) == [0, 2]


def test_keeping_everything_hands_the_tokens_through() -> None:
    tokens = VisualTokens.of(torch.rand(2, 5, 3))
    reduction = Strategy(RandomScorer(), Evict(9), ToMe(5))(tokens)
    assert reduction.tokens is tokens
    assert reduction.plan.is_identity


def test_autocast_changes_nothing() -> None:
    tokens = VisualTokens.of(torch.rand(1, 64, 8, generator=torch.Generator().manual_seed(1)))
    rows = torch.rand(1, 64, generator=torch.Generator().manual_seed(2))

    class Multiplies(FromSignal):
        def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
            return (tokens.features @ tokens.features.mT).sum(-1)  # bfloat16 under autocast

    strategy = Strategy(Multiplies(), Pairs(), Evict(10))
    expected = strategy(tokens, signals_of(rows))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = strategy(tokens, signals_of(rows))
    assert same_bits(got.tokens.features, expected.tokens.features)
    assert torch.equal(got.plan.dense(), expected.plan.dense())


def test_inputs_are_not_touched() -> None:
    tokens = VisualTokens.of(torch.rand(2, 6, 3))
    rows = torch.rand(2, 6)
    before = tokens.features.clone(), rows.clone()
    Strategy(FromSignal(), Evict(4), Pairs())(tokens, signals_of(rows))
    assert same_bits(tokens.features, before[0])
    assert same_bits(rows, before[1])


def test_signals_are_those_of_all_steps() -> None:
    strategy = Strategy(ClsAttentionScorer(3), Evict(5), RandomScorer(), Pairs())
    assert strategy.signals == {ClsAttention(3), Keys(-2)}
    assert Strategy(RandomScorer(), Evict(5)).signals == frozenset()


def test_strategies_and_stages_are_values() -> None:
    one, other = (Strategy(RandomScorer(3), Evict(5)).at(AfterLayer(4)) for _ in range(2))
    assert one == other
    assert len({one, other, one.strategy.at(BeforeLLM())}) == 2


# ------------------------------------------------------------------------------------ errors

TWO = VisualTokens.of(torch.zeros(1, 2, 1))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Strategy(), "a strategy ends with a reducer (evict, ...), got no steps"),
        (lambda: Strategy(RandomScorer()), "got RandomScorer"),
        (lambda: Strategy(RandomScorer(), Evict(3), UniformScorer()), "Evict, UniformScorer"),
        (lambda: Strategy(Evict(3)), "Evict ranks tokens by scores, but no scorer stands before"),
        (lambda: Strategy(Pairs(), Evict(3)), "try Strategy(ClsAttentionScorer(), Evict(...))"),
        (lambda: Strategy("random", Evict(3)), "a step must be a Scorer or a Reducer, got 'ra"),
        (
            lambda: Strategy(RandomScorer, Evict(3)),
            "a step is an instance, got the class Random",
        ),
        (lambda: Strategy("random", Evict(3)), "got 'random'"),
        (lambda: AfterLayer(0), "layers must be an int >= 1, got 0"),
        (lambda: AfterLayer(2.0), "layers must be an int >= 1, got 2.0"),
        (lambda: AfterLayer(positions="kept"), "positions must be 'reindexed' or 'original'"),
        (lambda: BeforeLLM("kept"), "got 'kept'"),
    ],
)
def test_impossible_strategies_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(SpecError) as caught:
        make()
    assert words in str(caught.value)


def test_nothing_left_is_refused_before_the_llm_and_allowed_after_a_layer() -> None:
    strategy = Strategy(RandomScorer(), Evict(0))
    with pytest.raises(BudgetError, match="keep=0 leaves no visual token before the LLM"):
        strategy.at(BeforeLLM())
    assert strategy.at(AfterLayer(15)).strategy is strategy
    assert strategy(TWO).tokens.mask.shape == (1, 0)


def test_missing_signals_say_what_is_there() -> None:
    strategy = Strategy(ClsAttentionScorer(3), Evict(1))
    with pytest.raises(MissingSignalError) as caught:
        strategy(TWO)
    assert str(caught.value) == "ClsAttention(layers=3) was not supplied; supplied: none"
    with pytest.raises(MissingSignalError, match=r"supplied: ClsAttention\(layers=1\)"):
        strategy(TWO, Signals({ClsAttention(1): torch.ones(1, 1, 1, 2)}))


@pytest.mark.parametrize(
    ("scores", "error", "words"),
    [
        (torch.tensor([[NAN, 0.0]]), ScoreError, "Gives returned NaN, which cannot be ranked"),
        (torch.zeros(1, 2).double(), ShapeError, "must return float32 scores with axes (batch tok"),
        (torch.zeros(1, 2).half(), ShapeError, "got torch.float16 (1, 2)"),
        (torch.zeros(1, 2).long(), ShapeError, "got torch.int64 (1, 2)"),
        (torch.zeros(2), ShapeError, "= (1, 2), got torch.float32 (2,)"),
        (torch.zeros(1, 2, 1), ShapeError, "got torch.float32 (1, 2, 1)"),
        (torch.zeros(1, 3), ShapeError, "got torch.float32 (1, 3)"),
        (torch.zeros(1, 2, device="meta"), ShapeError, "must return scores on cpu, got meta"),
    ],
)
def test_scores_that_cannot_be_ranked_are_refused(
    scores: Tensor, error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as caught:
        Strategy(Gives(scores), Evict(1))(TWO)
    assert words in str(caught.value)


def test_nan_on_padding_and_infinities_are_fine() -> None:
    mask = torch.tensor([[False, True, True, True]])
    tokens = VisualTokens.of(torch.zeros(1, 4, 1), mask=mask)
    reduction = Strategy(Gives(torch.tensor([[NAN, -INF, INF, 0.0]])), Evict(2))(tokens)
    assert slots_of(reduction.plan, 0) == [2, 3]


def test_a_signal_of_another_number_of_tokens_is_noticed() -> None:
    signals = Signals({ClsAttention(1): torch.ones(1, 1, 1, 3)})
    with pytest.raises(ShapeError, match="has 3 along 'tokens', where the visual tokens have 2"):
        Strategy(ClsAttentionScorer(1), Evict(1))(TWO, signals)
