"""Recipes expand to specs in plain sight."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from core.fakes import entry, installed, module_with
from tokenprune import (
    AfterLayer,
    BudgetError,
    ClsAttentionScorer,
    Evict,
    PluginError,
    RecipePlugin,
    ReducerPlugin,
    SpecError,
    Strategy,
    parse,
    parse_schedule,
    spec_of,
)
from tokenprune.plugins import CORE, registry

RECIPES = [offer.plugin for offer in registry().recipes if offer.origin == CORE]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_recipe_is_a_spec_with_a_reference(recipe: RecipePlugin) -> None:
    stages = parse_schedule(recipe.name)
    assert stages == parse_schedule(recipe.expand())
    assert stages == parse_schedule("; ".join(map(spec_of, stages)))
    assert recipe.paper or "floor" in recipe.summary
    if "keep" in recipe.defaults:
        for stage in parse_schedule(f"{recipe.name}(keep=7)"):
            assert "7" in spec_of(stage)


def test_the_papers_defaults() -> None:
    assert parse("vtc-cls").strategy == Strategy(ClsAttentionScorer(3, "avg"), Evict(128))
    assert parse("fastervlm").strategy == Strategy(ClsAttentionScorer(1), Evict(0.25, "crop"))


def test_arguments_by_place_and_by_name() -> None:
    expected = Strategy(ClsAttentionScorer(5, "max"), Evict(64))
    assert parse("vtc-cls(64, 5, 'max')").strategy == expected
    assert parse("vtc-cls(64, ensemble='max', layers=5)").strategy == expected


def test_a_placement_may_follow() -> None:
    stage = parse("vtc-cls(64) @ after-layer(2)")
    assert stage.placement == AfterLayer(2)
    assert stage.strategy == Strategy(ClsAttentionScorer(3), Evict(64))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("vtc-cls(ratio=0.5)", "recipe 'vtc-cls' takes keep, layers, ensemble, got ratio"),
        ("vtc-cls(1, 2, 'avg', 4)", "takes keep, layers, ensemble, got 1, 2, 'avg', 4"),
        ("vtc-cls(64, keep=3)", "takes keep, layers, ensemble, got 64, keep"),
        ("fastervlm(layers=3)", "recipe 'fastervlm' takes keep, newline, got layers"),
        ("random | vtc-cls", "'vtc-cls' is a recipe and stands alone"),
        ("vtc-cls | evict(3)", "write its steps out: cls-attention(layers=3, ensemble='avg')"),
        ("vtc-cls(ensemble='sum')", "ensemble must be 'avg', 'max' or 'min', got 'sum'"),
    ],
)
def test_wrong_arguments_are_refused(spec: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(spec)
    assert words in str(caught.value)


def test_budgets_are_checked_in_recipes_too() -> None:
    with pytest.raises(BudgetError, match="keep=0 leaves no visual token"):
        parse("vtc-cls(0)")


def test_recipes_of_several_stages_have_placements_of_their_own() -> None:
    recipe = RecipePlugin(
        "twice",
        "two stages",
        template="random | evict({keep}) @ before-llm; uniform | evict(3) @ after-layer(4)",
        defaults={"keep": 9},
    )
    with installed(entry("p", module_with(recipes=[recipe]))):
        first, second = parse_schedule("twice(8)")
        assert spec_of(first) == "random | evict(8) @ before-llm"
        assert spec_of(second) == "uniform | evict(3) @ after-layer(layers=4)"
        with pytest.raises(SpecError, match="'twice' is a schedule with placements of its own"):
            parse_schedule("twice @ before-llm")
        with pytest.raises(SpecError, match="has 2 stages; use parse_schedule"):
            parse("twice")


def test_recipes_do_not_nest() -> None:
    recipe = RecipePlugin("loop", "names itself", template="loop")
    with (
        installed(entry("p", module_with(recipes=[recipe]))),
        pytest.raises(SpecError, match="'loop' is a recipe and stands alone"),
    ):
        parse("loop")


@dataclass(frozen=True)
class Drop(Evict):
    """A reducer of a third party."""


def test_a_recipe_may_share_its_name_with_a_reducer() -> None:
    """Alone it is the recipe; with a scorer before it, or arguments of its own, the reducer."""
    recipe = RecipePlugin(
        "drop", "a recipe", template="random | drop({keep})", defaults={"keep": 5}
    )
    reducer = ReducerPlugin("drop", "a reducer", Drop)
    with installed(entry("p", module_with(recipes=[recipe], reducers=[reducer]))):
        assert spec_of(parse("drop").strategy) == "random | drop(5)"
        assert spec_of(parse("uniform | drop(4)").strategy) == "uniform | drop(4)"
        with pytest.raises(SpecError, match="Drop ranks tokens by scores"):
            parse("drop(4, per='crop')")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("random | evict({keep})", "recipe 'odd' has no default for a field of its template"),
        ("random | evict({keep})", "'random | evict({keep})': 'keep'"),
        ("random | evict({})", "positional fields"),
        ("random | evict(3})", "Single '}' encountered"),
    ],
)
def test_templates_need_their_defaults(template: str, words: str) -> None:
    with pytest.raises(PluginError) as caught:
        RecipePlugin("odd", "lacks a default", template=template)
    assert words in str(caught.value)
