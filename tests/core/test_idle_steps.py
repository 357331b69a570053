"""Steps and arguments that can have no effect are refused, in words; ends of sweeps are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from core.test_strategy import Pairs
from tokenprune import (
    Budgeted,
    BudgetError,
    ClsAttentionScorer,
    Diverse,
    DominantContextual,
    FoPruScorer,
    ImportantDiverse,
    Keep,
    KMeans,
    Plan,
    Pool,
    PruMerge,
    PruMergePlus,
    RandomScorer,
    Reducer,
    Signals,
    SpecError,
    Strategy,
    ToMe,
    UniformScorer,
    VisualTokens,
    parse,
)
from tokenprune.spec import stages_of

CLS, EVEN = ClsAttentionScorer(), UniformScorer()


@dataclass(frozen=True)
class AboutAsMany(Budgeted, Reducer):
    """A reducer that does not promise to meet its budget."""

    exempt: ClassVar[Mapping[str, str]] = {"P3": "it counts by weight"}

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        raise AssertionError("never run")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            "cls-attention | uniform | evict(4)",
            "ClsAttentionScorer(layers=3, ensemble='avg') has no effect: UniformScorer() comes "
            "before any reducer and replaces its scores; leave one of them out, or put a reducer "
            "between them, as in 'cls-attention | evict(288) | uniform | evict(144)'",
        ),
        ("uniform | evict(9) | random | uniform | evict(4)", "RandomScorer(seed=0) has no effect"),
        ("uniform | uniform | evict(4)", "UniformScorer() has no effect: UniformScorer() comes"),
        ("cls-attention | tome(8)", "ToMe(keep=8, per='image', metric='features', layer=-2) reads"),
        ("random | kmeans(8)", "RandomScorer(seed=0) has no effect: KMeans(keep=8"),
        ("random | pool(8)", "Pool(keep=8, per='image', grid=None) reads no scores"),
        ("uniform | diverse(8)", "leave the scorer out, or use a reducer that ranks by scores"),
        ("cls-attention | prumerge", "PruMerge(keep=None"),
        (
            "uniform | pool(9) | kmeans(4)",
            "UniformScorer() has no effect: Pool(keep=9, per='image', grid=None), KMeans(keep=4, "
            "per='image', seed=0, iterations=20) read no scores; leave the scorer out, or use a "
            "reducer that ranks by scores, as in 'cls-attention | evict(128)'",
        ),
        ("cls-attention | prumerge-plus(8)", "PruMergePlus(keep=8"),
        ("uniform | evict(9) | random | tome(4)", "RandomScorer(seed=0) has no effect: ToMe"),
        (
            "uniform | pool(9) | tome(4)",
            "UniformScorer() has no effect: Pool(keep=9",
        ),
        ("uniform | tome(9) | random | evict(4)", "UniformScorer() has no effect: ToMe(keep=9"),
        ("cls-attention | dominant-contextual(8, contextual=1.0)", "contextual=1.0"),
        ("cls-attention | dominant-contextual(8, contextual=8)", "reads no scores"),
        ("cls-attention | dominant-contextual(8, contextual=9)", "reads no scores"),
    ],
)
def test_a_scorer_that_nobody_reads_is_refused(spec: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(spec)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            "uniform | evict(4) | evict(9)",
            "Evict(keep=9, per='image') has no effect: earlier steps leave at most 4 visual tokens "
            "per image, and it keeps that many; leave it out, or give it a smaller budget",
        ),
        ("uniform | evict(4) | evict(4)", "Evict(keep=4, per='image') has no effect"),
        ("pool(4) | tome(0.9)", "ToMe(keep=0.9, per='image', metric='features', layer=-2) has no"),
        ("pool(9) | tome(0.5) | kmeans(5)", "leave at most 5 visual tokens per image"),
        ("pool(1) | tome(0.5)", "leave at most 1 visual tokens per image"),
        ("uniform | evict(4) | random | evict(9)", "Evict(keep=9, per='image') has no effect"),
        (
            "uniform | evict(0) | tome(3) @ after-layer(2)",
            "ToMe(keep=3, per='image', metric='features', layer=-2) has no effect: Evict(keep=0, "
            "per='image') leaves no visual token, before or after; leave one of them out",
        ),
        ("uniform | evict(0) | prumerge @ after-layer(2)", "PruMerge(keep=None"),
        ("tome(9) | random | evict(0) @ after-layer(2)", "has no effect: Evict(keep=0"),
        ("prumerge | tome(1.0)", "ToMe(keep=1.0, per='image', metric='features', layer=-2) has"),
        (
            "uniform | evict(9) | evict(8)",
            "Evict(keep=9, per='image') has no effect: Evict(keep=8, per='image') comes next and "
            "ranks the same tokens by the same scores; leave the first one out, or put a scorer",
        ),
        ("uniform | pool(9) | evict(4) | evict(2)", "Evict(keep=4, per='image') has no effect"),
        ("uniform | evict(0.9) | evict(2)", "Evict(keep=0.9, per='image') has no effect"),
        ("uniform | evict(4, per='crop') | tome(9, per='crop')", "4 visual tokens per crop"),
        ("tome(9) | prumerge(9)", "PruMerge(keep=9"),
        ("uniform | evict(1.0) | tome(0.5)", "Evict(keep=1.0, per='image') has no effect: it kee"),
        ("pool(0.5) | tome(1.0)", "ToMe(keep=1.0, per='image', metric='features', layer=-2) has"),
    ],
)
def test_a_reducer_after_which_nothing_changes_is_refused(spec: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(spec)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "spec",
    [
        "uniform | evict(1.0)",  # the model as it is
        "uniform | evict(9) | random | evict(8)",
        "uniform | evict(9) | tome(8)",
        "uniform | evict(9) | evict(0.5)",
        "uniform | evict(0.5) | evict(8)",  # of 9 tokens, 5 stay
        "uniform | evict(0.5) | evict(0.5)",
        "uniform | evict(4, per='crop') | evict(4)",
        "dominant-contextual(8, contextual=1.0)",  # needs no scorer
        "uniform | evict(9) | tome(0.5) | random | evict(4)",
        "uniform | evict(0.5) | tome(8)",
        "cls-attention | pool(9) | evict(4)",  # scores are merged as the tokens are
        "cls-attention(layers=1, ensemble='max') | evict(4)",
        "cls-attention | dominant-contextual(8, contextual=0)",
        "cls-attention | dominant-contextual(0.5, contextual=8)",
        "cls-attention | important-diverse(8, important=1.0)",
        "cls-attention | important-diverse(8, important=0)",
        "kmeans(8, iterations=0)",
        "prumerge(neighbours=0)",
        "uniform | evict(4, per='crop') | tome(9)",  # for an adapter to refuse: it knows crops
        "prumerge | tome(9)",
    ],
)
def test_ends_of_sweeps_and_what_may_have_an_effect_are_not_refused(spec: str) -> None:
    parse(spec)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: ToMe(8, layer=-3),
            "layer=-3 has no effect: metric='features' reads no keys; leave it out, or say "
            "metric='keys'",
        ),
        (lambda: Diverse(8, layer=-1), "layer=-1 has no effect: metric='features' reads no keys"),
        (lambda: DominantContextual(8, metric="features", layer=-1), "layer=-1 has no effect"),
        (lambda: FoPruScorer(columns=24), "columns=24 has no effect: mode='rank' has no rows"),
        (lambda: PruMerge(Keep(8, "crop"), per="frame"), "per='frame' contradicts Keep(amount=8"),
        (lambda: PruMergePlus(Keep(8, "crop"), "frame"), "give it once"),
        (lambda: PruMerge(per="frames"), "per must be one of image, crop, frame, got 'frames'"),
    ],
)
def test_an_argument_that_another_overrules_is_refused(
    make: Callable[[], object], words: str
) -> None:
    with pytest.raises((SpecError, BudgetError)) as caught:
        make()
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            "fastv(layer=5) @ after-layer(2)",
            "'fastv(layer=5) @ after-layer(2)' has two placements: arguments of 'fastv' ask for @ "
            "after-layer(5, positions='original'), and it is followed by another one; give one of",
        ),
        ("fastv(0.5, 2, 'last', 'reindexed') @ after-layer(3)", "ask for @ after-layer(2, positi"),
        ("fastervlm(newline='drop') @ before-llm", "ask for @ before-llm(newline='drop')"),
    ],
)
def test_a_placement_that_another_overrules_is_refused(spec: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(spec)
    assert words in str(caught.value)


def test_a_recipe_may_stand_elsewhere() -> None:
    assert parse("fastv(0.25) @ after-layer(3)") == parse("fastv | evict(0.25) @ after-layer(3)")
    steps = parse("kmeans(0) @ after-layer(2)").strategy.steps  # which before the LLM is refused
    assert steps == (KMeans(0),)


def test_the_other_argument_makes_it_count() -> None:
    assert ToMe(8, metric="keys", layer=-3).layer == -3
    assert FoPruScorer("row", columns=24).columns == 24
    assert PruMerge(Keep(8, "crop"), "crop").per == "crop"
    assert isinstance(PruMerge(), Budgeted)  # so adapters see what its budget is for


def test_a_reducer_that_may_read_scores_is_taken_to_read_them() -> None:
    Strategy(CLS, Pairs())
    with pytest.raises(SpecError, match="replaces its scores"):
        Strategy(CLS, EVEN, Pairs())


@dataclass(frozen=True)
class First(Reducer):
    """A reducer with a budget, but without a say in what it is for."""

    keep: int

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        raise AssertionError("never run")


def test_a_budget_is_for_a_picture_where_nobody_says_what_for() -> None:
    Strategy(First(9), First(4))
    with pytest.raises(SpecError, match=r"First\(keep=9\) has no effect: .* per image, and"):
        Strategy(ToMe(4), First(9))


def test_a_budget_that_need_not_be_met_tells_nothing_about_later_ones() -> None:
    Strategy(AboutAsMany(4), ToMe(9))
    Strategy(AboutAsMany(4), ToMe(9), Pool(8))
    with pytest.raises(SpecError, match="AboutAsMany.* has no effect"):
        Strategy(ToMe(4), AboutAsMany(9))


@pytest.mark.parametrize(
    "specs",
    [
        ["cls-attention | evict(9)", "fastv | evict(4) @ after-layer(2)"],
        ["uniform | evict(0) @ after-layer(15)", "fastv | evict(4) @ after-layer(20)"],
        ["pyramiddrop(keep=7)"],
    ],
)
def test_stages_of_a_schedule_are_not_compared(specs: list[str]) -> None:
    """What a later stage finds is seen in the report, of that stage."""
    assert len(stages_of(specs)) >= 2


def test_without_dominant_tokens_no_scorer_is_needed() -> None:
    tokens = VisualTokens.of(torch.rand(2, 16, 4))
    alone = DominantContextual(4, contextual=4, metric="features")
    given = alone.plan(tokens, torch.rand(2, 16), Signals())
    assert torch.equal(Strategy(alone)(tokens).plan.dense(), given.dense())


def test_what_is_refused_would_have_done_nothing() -> None:
    """The reason for all of this: with and without the idle step, results are the same."""
    tokens = VisualTokens.of(torch.rand(1, 16, 4))
    merged = ToMe(4).plan(tokens, None, Signals())
    scored = ToMe(4).plan(tokens, RandomScorer(1).score(tokens, Signals()), Signals())
    assert torch.equal(merged.dense(), scored.dense())
    scores = torch.rand(1, 16)
    for reducer in (DominantContextual(4, contextual=1.0, metric="features"),):
        one = reducer.plan(tokens, scores, Signals())
        other = reducer.plan(tokens, -scores, Signals())
        assert torch.equal(one.dense(), other.dense())
    thin = ImportantDiverse(8, important=0)  # reads them: their order is where it starts
    one, other = (thin.plan(tokens, s, Signals()) for s in (scores, scores.roll(5, 1)))
    assert not torch.equal(one.dense(), other.dense())
