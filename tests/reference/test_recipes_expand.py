"""Recipes expand to what the papers say, and share names with steps without getting in the way."""

from __future__ import annotations

import pytest

from tokenprune import (
    AfterLayer,
    ClsAttentionScorer,
    Diverse,
    DominantContextual,
    Evict,
    FoPruScorer,
    ImportantDiverse,
    KMeans,
    PruMerge,
    PruMergePlus,
    RandomScorer,
    SpecError,
    Strategy,
    ToMe,
    UniformScorer,
    parse,
    spec_of,
)
from tokenprune.recipes import RECIPES

EXPANDED = {
    "vtc-cls": Strategy(ClsAttentionScorer(3, "avg"), Evict(128)),
    "fastervlm": Strategy(ClsAttentionScorer(1), Evict(0.25, "crop")),
    "random": Strategy(RandomScorer(0), Evict(128)),
    "uniform": Strategy(UniformScorer(), Evict(128)),
    "tome": Strategy(ToMe(128)),
    "kmeans": Strategy(KMeans(128)),
    "prumerge": Strategy(PruMerge()),
    "prumerge-plus": Strategy(PruMergePlus()),
    "vispruner": Strategy(ClsAttentionScorer(1), ImportantDiverse(128, important=0.5)),
    "visionzip": Strategy(ClsAttentionScorer(1), DominantContextual(64, contextual=0.15625)),
    "divprune": Strategy(Diverse(0.098)),
    "fopru": Strategy(FoPruScorer("rank"), Evict(0.25)),
}


@pytest.mark.parametrize("name", EXPANDED)
def test_defaults(name: str) -> None:
    assert parse(name).strategy == EXPANDED[name]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_recipe_says_what_it_is_and_survives_the_way_back(recipe: object) -> None:
    stage = parse(recipe.name)
    assert parse(spec_of(stage)) == stage
    assert recipe.paper or recipe.name == "uniform"
    assert recipe.differs or recipe.name == "uniform"


@pytest.mark.parametrize(
    ("spec", "strategy"),
    [
        ("tome(64)", Strategy(ToMe(64))),
        ("tome(keep=64)", Strategy(ToMe(64))),
        ("tome(64, metric='keys', layer=-3)", Strategy(ToMe(64, metric="keys", layer=-3))),
        ("kmeans(64, seed=3)", Strategy(KMeans(64, seed=3))),
        ("kmeans(0.5, 'crop')", Strategy(KMeans(0.5, "crop"))),
        ("random(64)", Strategy(RandomScorer(), Evict(64))),
        ("random(64, seed=7)", Strategy(RandomScorer(7), Evict(64))),
        ("random(seed=7) | evict(64)", Strategy(RandomScorer(7), Evict(64))),
        ("prumerge(64)", Strategy(PruMerge(64))),
        ("prumerge(keep=64, heads='mean')", Strategy(PruMerge(64, heads="mean"))),
        ("prumerge(normalize=True)", Strategy(PruMerge(normalize=True))),
        ("fopru(64, mode='row')", Strategy(FoPruScorer("row"), Evict(64))),
        ("fopru('row') | evict(64)", Strategy(FoPruScorer("row"), Evict(64))),
        (
            "visionzip(128)",
            Strategy(ClsAttentionScorer(1), DominantContextual(128, contextual=0.15625)),
        ),
        (
            "cls-attention | evict(256) | tome(128)",
            Strategy(ClsAttentionScorer(), Evict(256), ToMe(128)),
        ),
    ],
)
def test_names_that_a_recipe_shares_with_a_step_work_as_either(
    spec: str, strategy: Strategy
) -> None:
    stage = parse(spec)
    assert stage.strategy == strategy
    assert parse(spec_of(stage)) == stage


def test_a_recipe_may_stand_elsewhere() -> None:
    assert parse("tome(128) @ after-layer(3)").placement == AfterLayer(3)
    assert parse("random(128) @ after-layer(2)").strategy == EXPANDED["random"]


def test_what_neither_takes_is_refused_by_name() -> None:
    with pytest.raises(SpecError, match="tome takes keep, per, metric, layer"):
        parse("tome(128, rounds=3)")
    with pytest.raises(SpecError, match="recipe 'vispruner' takes keep, important"):
        parse("vispruner(128, step=4)")
