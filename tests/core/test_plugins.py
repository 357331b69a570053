"""Plugins: one door for all, conflicts that name both sides, faults that stay at home."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from core.fakes import (
    FakeAdapter,
    FakeTowerAdapter,
    Model,
    Nearer,
    SaysScorer,
    Tower,
    entry,
    installed_in,
    module_with,
    name_of,
    registry_of,
)
from tokenprune import (
    Evict,
    ModelPlugin,
    PluginError,
    Pool,
    RandomScorer,
    RecipePlugin,
    ReducerPlugin,
    Scorer,
    ScorerPlugin,
    Signals,
    TowerPlugin,
    UnknownNameError,
    UnsupportedError,
    VisualTokens,
    builtin,
    hookimpl,
    parse,
)
from tokenprune.plugins import CORE, INTERFACE, registry
from tokenprune.plugins.discovery import build_registry
from tokenprune.plugins.hookspec import HOOKS

SAYS = ScorerPlugin("says", "a text", SaysScorer)


def model_plugin(name: str, *claims: type) -> ModelPlugin:
    return ModelPlugin(name, "a model", FakeAdapter, tuple(map(name_of, claims)))


# ----------------------------------------------------------------------------------- one door


def test_built_ins_come_through_the_same_door() -> None:
    without = build_registry([], {})
    assert not without.scorers
    assert not without.reducers
    as_entry = registry_of(entry("p", module_with(scorers=[SAYS])))
    origins = {offer.plugin.name: offer.origin for offer in as_entry.scorers}
    assert origins["random"] == CORE
    assert origins["says"] == "p"
    third_party = build_registry([entry("elsewhere", builtin)], {})  # type: ignore[list-item]
    assert {o.plugin.name for o in third_party.scorers} == {
        o.plugin.name for o in build_registry([], {CORE: builtin}).scorers
    }


def test_a_real_entry_point_is_loaded() -> None:
    point = EntryPoint("core-again", "tokenprune.builtin", "tokenprune")
    offers = build_registry([point], {}).reducers
    assert {offer.origin for offer in offers} == {"tokenprune.builtin"}
    assert Evict in [offer.plugin.factory for offer in offers]


def test_all_kinds_of_records_arrive() -> None:
    records = {
        "scorers": SAYS,
        "reducers": ReducerPlugin("drop", "evict again", Evict),
        "towers": TowerPlugin("a-tower", "a tower", FakeTowerAdapter, (name_of(Tower),)),
        "models": model_plugin("a-model", Model),
        "recipes": RecipePlugin("say-3", "a recipe", "says | evict(3)"),
    }
    assert set(records) == set(HOOKS)
    module = module_with(**{kind: [record] for kind, record in records.items()})
    known = build_registry([entry("p", module)], {})  # type: ignore[list-item]
    for kind, record in records.items():
        (offer,) = getattr(known, kind)
        assert offer.plugin is record
        assert offer.origin == "p"
    assert known.names(known.scorers) == ["says"]
    assert known.named(known.scorers, "says", "scorer") is SAYS
    assert known.named(known.scorers, "nothing", "scorer") is None


def test_hooks_may_be_generators_and_plugins_objects() -> None:
    class Plugin:
        @hookimpl
        def tokenprune_scorers(self) -> object:
            yield SAYS

    known = registry_of(entry("p", Plugin()))
    assert "says" in known.names(known.scorers)


def test_two_packages_may_call_their_plugin_the_same() -> None:
    one, other = module_with(scorers=[SAYS]), module_with(recipes=[RecipePlugin("r", "r", "says")])
    assert one.__name__ == other.__name__
    known = registry_of(entry("p", one), entry("q", other))
    assert not known.broken
    assert known.named(known.recipes, "r", "recipe")


def test_what_is_installed_is_found_once() -> None:
    assert registry() is registry()
    offers = [*registry().scorers, *registry().reducers, *registry().recipes]
    assert all(offer.origin for offer in offers)


def test_every_built_in_makes_sense_to_a_reader() -> None:
    known = build_registry([], {CORE: builtin})
    for offer in [*known.scorers, *known.reducers]:
        assert offer.plugin.factory.__doc__
        assert len(offer.plugin.summary) < 100
    for names in (known.names(known.scorers), known.names(known.reducers)):
        assert len(names) == len(set(names))


# ---------------------------------------------------------------------------------- conflicts


KINDS = {
    "scorers": lambda name: ScorerPlugin(name, "a scorer", SaysScorer),
    "reducers": lambda name: ReducerPlugin(name, "a reducer", Evict),
    "recipes": lambda name: RecipePlugin(name, "a recipe", "random | evict(3)"),
    "towers": lambda name: TowerPlugin(name, "a tower", FakeTowerAdapter, ()),
    "models": lambda name: ModelPlugin(name, "a model", FakeAdapter, ()),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["pool", "random", "hf-llava"])
def test_names_of_our_own_cannot_be_taken(kind: str, name: str) -> None:
    """A recipe called `pool` would change what `pool(16)` means, for everyone."""
    records: dict[str, Any] = {"scorers": [SAYS]}
    records[kind] = [*records.get(kind, []), KINDS[kind](name)]
    module = module_with(**records)
    ours = entry("adapters", module_with(models=[KINDS["models"]("hf-llava")]), dist=CORE)
    with pytest.warns(UserWarning, match=f"PluginError: '{name}' is the name of a .* of token"):
        known = registry_of(entry("p", module, dist="my-dist"), ours)
    assert "says" not in known.names(known.scorers)  # all of a package or nothing
    with installed_in(known):
        assert parse("pool(16)").strategy.steps == (Pool(16),)
        assert isinstance(parse("random | evict(3)").strategy.steps[0], RandomScorer)


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_a_name_of_two_packages_belongs_to_nobody(first: str, second: str) -> None:
    known = registry_of(
        entry("a", module_with(**{first: [KINDS[first]("mine")]}), dist="dist-a"),
        entry("b", module_with(**{second: [KINDS[second]("mine")]}), dist="dist-b"),
    )
    assert known.holders("mine") == {
        "dist-a": first.removesuffix("s"),
        "dist-b": second.removesuffix("s"),
    }
    with pytest.raises(PluginError) as caught:
        known.named(getattr(known, first), "mine", first.removesuffix("s"))
    said = str(caught.value)
    assert said.startswith("'mine' is a name of two plugins: a ")
    assert f"a {first[:-1]} of dist-a" in said
    assert f"a {second[:-1]} of dist-b" in said
    assert said.endswith(f"uninstall one, or use the class instead of the name of the {first[:-1]}")
    assert known.named(known.scorers, "uniform", "scorer")  # the others still work


@pytest.mark.parametrize(("first", "second"), [("scorers", "reducers"), ("recipes", "recipes")])
def test_a_package_gives_a_name_once(first: str, second: str) -> None:
    records = {first: [KINDS[first]("mine")]}
    records[second] = [*records.get(second, []), KINDS[second]("mine")]
    with pytest.warns(UserWarning, match="it offers two things called 'mine'"):
        registry_of(entry("p", module_with(**records)))


def test_a_recipe_may_be_called_like_a_step_of_its_own_package() -> None:
    records = {kind: [KINDS[kind]("mine")] for kind in ("scorers", "recipes", "models", "towers")}
    known = registry_of(entry("p", module_with(**records)))
    assert not known.broken
    assert known.named(known.recipes, "mine", "recipe")


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (INTERFACE, None),
        (None, None),
        (
            INTERFACE + 1,
            "version 2 of the plugin interface, and this tokenprune-vlm has version 1",
        ),
        (0, "takes 1 to 1: upgrade p, or install an older tokenprune-vlm"),
        ("1", "tokenprune_interface must be an int such as 1, got '1'"),
    ],
)
def test_the_interface_has_a_version(version: object, words: str | None) -> None:
    module = module_with(scorers=[SAYS])
    if version is not None:
        module.tokenprune_interface = version  # type: ignore[attr-defined]
    if words is None:
        known = registry_of(entry("p", module))
        assert "says" in known.names(known.scorers)
        return
    with pytest.warns(UserWarning, match=words):
        known = registry_of(entry("p", module))
    assert "says" not in known.names(known.scorers)


def test_two_adapters_of_one_class_are_both_named_and_one_can_be_chosen() -> None:
    known = registry_of(
        entry("a", module_with(models=[model_plugin("first", Model)]), dist="dist-a"),
        entry("b", module_with(models=[model_plugin("second", Model)]), dist="dist-b"),
    )
    with pytest.raises(PluginError) as caught:
        known.claiming(known.models, Model(), None)
    assert str(caught.value) == (
        f"two adapters claim {name_of(Model)}: 'first' of dist-a and 'second' of dist-b; "
        "choose one: attach(..., adapter='first')"
    )
    assert known.claiming(known.models, Model(), "second").name == "second"
    with pytest.raises(UnsupportedError) as refused:
        known.claiming(known.models, Tower(), "second")
    assert str(refused.value) == (
        "adapter 'second' is for Model, not for Tower; no adapter claims that class"
    )
    with pytest.raises(UnknownNameError, match="no model adapter is called 'third'; known: fir"):
        known.claiming(known.models, Model(), "third")


@pytest.mark.parametrize("nearer_first", [True, False])
def test_the_nearest_class_wins(nearer_first: bool) -> None:
    plugins = [model_plugin("near", Nearer), model_plugin("far", Model)]
    known = registry_of(entry("p", module_with(models=plugins[:: 1 if nearer_first else -1])))
    assert known.claiming(known.models, Nearer(), None).name == "near"
    assert known.claiming(known.models, Model(), None).name == "far"


def test_a_subclass_is_served_by_the_adapter_of_its_base() -> None:
    known = registry_of(entry("p", module_with(models=[model_plugin("far", Model)])))
    assert known.claiming(known.models, Nearer(), None).name == "far"


def test_without_an_adapter_the_supported_are_listed() -> None:
    known = registry_of(
        entry("p", module_with(models=[model_plugin("a", Nearer), model_plugin("b", Model)]))
    )
    with pytest.raises(UnsupportedError) as caught:
        known.claiming(known.models, Tower(), None)
    assert str(caught.value) == (
        f"no adapter supports {name_of(Tower)} as a model; take the whole model, Nearer or Model; "
        "supported: of core Model, Nearer. `tokenprune list --models` says what can be done to "
        "each; 'Use another model' in the documentation how to serve others; and strategies work "
        "on tensors, without any adapter"
    )
    with pytest.raises(UnsupportedError, match="Tower as a tower; supported: none .install"):
        known.claiming(known.towers, Tower(), None)
    assert isinstance(caught.value, NotImplementedError)


# ------------------------------------------------------------------------------ faulty plugins


def misspelled() -> ModuleType:
    module = module_with(scorers=[SAYS])
    module.tokenprune_scorer = hookimpl(lambda: iter(()))  # type: ignore[attr-defined]
    return module


def fails_late() -> ModuleType:
    def towers() -> object:
        yield TowerPlugin("half", "comes first", FakeTowerAdapter, ())
        raise RuntimeError("then fails")

    return module_with(scorers=[SAYS], towers=towers)


def takes_arguments() -> ModuleType:
    module = module_with(scorers=[SAYS])
    module.tokenprune_models = hookimpl(lambda config: [])  # type: ignore[attr-defined]
    return module


def two_faults() -> ModuleType:
    """A misspelled hook is read before the one with an argument makes pluggy give up."""
    module = takes_arguments()
    module.tokenprune_aaa = hookimpl(lambda: iter(()))  # type: ignore[attr-defined]
    return module


FAULTS = {
    "misspelled": (misspelled, "tokenprune_scorer"),
    "fails-late": (fails_late, "then fails"),
    "takes-arguments": (takes_arguments, "config"),
    "two-faults": (two_faults, "config"),
    "wrong-record": (
        lambda: module_with(reducers=[SAYS]),
        "tokenprune_reducers must yield ReducerPlugin, got ScorerPlugin(name='says'",
    ),
    "yields-a-class": (lambda: module_with(scorers=[SaysScorer]), "must yield ScorerPlugin, got"),
    "yields-nothing": (lambda: module_with(scorers=lambda: 3), "not iterable"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_plugin_is_named_and_skipped(name: str) -> None:
    make, words = FAULTS[name]
    fine = module_with(recipes=[RecipePlugin("fine", "works", "random | evict(3)")])
    with pytest.warns(UserWarning, match="skips the plugin") as caught:
        known = registry_of(entry(name, make(), dist="their-dist"), entry("fine-plugin", fine))
    (warning,) = caught
    message = str(warning.message)
    assert message.startswith(f"tokenprune skips the plugin {name!r} of 'their-dist': ")
    assert words in message
    assert known.named(known.scorers, "says", "scorer") is None  # all of it, or none
    assert known.named(known.towers, "half", "tower") is None
    assert known.named(known.recipes, "fine", "recipe")  # the others do not suffer
    assert known.named(known.scorers, "random", "scorer")
    assert set(known.broken) == {name, "their-dist"}
    for asked in (name, "their-dist"):
        with pytest.raises(PluginError, match=f"plugin '{asked}' is broken: ") as raised:
            known.named(known.scorers, asked, "scorer")
        assert raised.value.__cause__ is known.broken[asked]
    with pytest.raises(UnsupportedError, match=r"broken plugins: .*their-dist"):
        known.claiming(known.models, Model(), None)


def test_misspelled_hooks_list_the_right_ones() -> None:
    with pytest.warns(UserWarning, match="the hooks are tokenprune_scorers, tokenprune_reducers"):
        registry_of(entry("p", misspelled()))


def test_a_plugin_that_cannot_be_imported_is_named() -> None:
    point = EntryPoint("gone", "a_package_that_is_not_there.plugin", "tokenprune")
    with pytest.warns(UserWarning, match="'gone' of 'a_package_that_is_not_there.plugin': Module"):
        known = build_registry([point], {CORE: builtin})
    with pytest.raises(PluginError, match="No module named 'a_package_that_is_not_there'"):
        known.named(known.scorers, "gone", "scorer")
    with pytest.raises(PluginError, match="plugin 'gone' is broken"):
        known.claiming(known.models, Model(), "gone")


def test_one_object_behind_two_entry_points_counts_once() -> None:
    module = module_with(scorers=[SAYS])
    with pytest.warns(UserWarning, match="another entry point offers the same object"):
        known = registry_of(entry("one", module), entry("two", module))
    assert known.named(known.scorers, "says", "scorer") is SAYS
    assert [o.origin for o in known.scorers if o.plugin is SAYS] == ["one"]


def test_sound_plugins_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry_of(entry("p", module_with(scorers=[SAYS])), entry("empty", ModuleType("empty")))


# ------------------------------------------------------------------------------------ records


@pytest.mark.parametrize(
    "name", ["", "Says", "says_it", "says--it", "-says", "says-", "3d", "says it", 3, None]
)
def test_names_are_kebab_case(name: str) -> None:
    with pytest.raises(PluginError) as caught:
        ScorerPlugin(name, "a text", SaysScorer)
    assert str(caught.value) == f"a plugin's name must be kebab-case like 'my-idea', got {name!r}"


@pytest.mark.parametrize("summary", ["", "two\nlines"])
def test_summaries_are_one_line(summary: str) -> None:
    with pytest.raises(PluginError, match="plugin 'says' needs a summary of one line"):
        ScorerPlugin("says", summary, SaysScorer)


@pytest.mark.parametrize(
    "claims", ["transformers.models.llava.Llava", (Model,), [3], ("Llava",), ("a.b-c",)]
)
def test_claims_are_names_of_classes(claims: tuple[str, ...]) -> None:
    """A lone string would claim whatever is a part of it, a short name nothing at all."""
    for record, factory in ((ModelPlugin, FakeAdapter), (TowerPlugin, FakeTowerAdapter)):
        with pytest.raises(PluginError, match="'x' must claim a tuple of full class names, such"):
            record("x", "an adapter", factory, claims)  # type: ignore[arg-type]


class Loose(SaysScorer):
    """Forgets that a subclass with fields is a dataclass only if it says so."""

    strength: float = 2.0


@dataclass
class Thawed(Scorer):
    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        return torch.zeros(tokens.mask.shape)


class Plain(Scorer):
    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        return torch.zeros(tokens.mask.shape)


@dataclass(frozen=True)
class Unfinished(Scorer):
    pass


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (
            SaysScorer(),
            "must offer the class of a scorer, a subclass of tokenprune.Scorer, got",
        ),
        (lambda: SaysScorer(), "must offer the class of a scorer"),
        (Evict, "must offer the class of a scorer"),
        (Loose, "Loose of plugin 'x' annotates strength, but is no dataclass of its own"),
        (Thawed, "Thawed of plugin 'x' must be a frozen dataclass"),
        (Plain, "Plain of plugin 'x' must be a frozen dataclass"),
        (Unfinished, "Unfinished of plugin 'x' does not define score"),
    ],
)
def test_factories_of_steps_are_frozen_dataclasses(factory: Any, words: str) -> None:
    with pytest.raises(PluginError, match=words):
        ScorerPlugin("x", "a scorer", factory)


def test_factories_of_adapters_give_adapters() -> None:
    with pytest.raises(PluginError, match="the factory of plugin 'x' must be a function"):
        ModelPlugin("x", "a model", FakeAdapter(), ())  # type: ignore[arg-type]
    with pytest.raises(PluginError, match="trials of plugin 'x' must be a function"):
        ModelPlugin("x", "a model", FakeAdapter, (), trials=[])  # type: ignore[arg-type]
    for record, factory in (
        (ModelPlugin, lambda: FakeAdapter),
        (ModelPlugin, FakeTowerAdapter),
        (TowerPlugin, FakeAdapter),
    ):
        made = record("x", "an adapter", factory, ())
        with pytest.raises(PluginError, match="plugin 'x' must give an instance of tokenprune"):
            made.adapter()


@pytest.mark.parametrize(
    ("template", "defaults", "words"),
    [
        (3, {}, "needs a template"),
        ("random | evict(3)", ["keep"], "needs a template"),
        ("random | evict({keep})", {"keep": 3, "seed": 0}, "a default for 'seed', which its tem"),
        ("random | | evict(3)", {}, "recipe 'x' is no spec: nothing stands on one side"),
        ("random @ before-llm @ before-llm", {}, "recipe 'x' is no spec"),
    ],
)
def test_recipes_are_specs(template: Any, defaults: Any, words: str) -> None:
    with pytest.raises(PluginError, match=words):
        RecipePlugin("x", "a recipe", template, defaults)


def test_records_cannot_be_changed() -> None:
    recipe = RecipePlugin("r", "a recipe", "random | evict({keep})", {"keep": 3})
    with pytest.raises(TypeError):
        recipe.defaults["keep"] = 4  # type: ignore[index]
    with pytest.raises(AttributeError):
        recipe.name = "other"  # type: ignore[misc]
