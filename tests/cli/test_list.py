from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from typer.testing import Result

from tokenprune import Evict, Keep, Plan, ScorerPlugin, Signals, VisualTokens, __version__
from tokenprune.cli import listing
from tokenprune.cli.catalogue import catalogue, markdown
from tokenprune.plugins import RecipePlugin, ReducerPlugin, Registry, registry
from tokenprune.plugins.offers import Offer
from tokenprune.scorers import RandomScorer
from tokenprune.strategy import Reducer

Command = Callable[..., Result]


def test_every_offer_is_one_line(tokenprune: Command) -> None:
    lines = tokenprune("list").output.splitlines()
    known = registry()
    kinds = (known.scorers, known.reducers, known.recipes, known.towers, known.models)
    for offers in kinds:
        for offer in offers:
            found = [line for line in lines if line.split()[:1] == [offer.plugin.name]]
            assert any(
                offer.plugin.summary in line and line.endswith(f"[{offer.origin}]")
                for line in found
            ), offer.plugin.name
    assert any(line.startswith("  before-llm") for line in lines)
    assert any(line.startswith("  after-layer") for line in lines)


def test_models_say_what_can_be_done_to_them(tokenprune: Command) -> None:
    output = tokenprune("list", "--models").output
    blocks = {block.partition("\n")[0]: block for block in output.split("\n\n")}
    for offer in registry().models:
        names = ", ".join(claim.rpartition(".")[2] for claim in offer.plugin.claims)
        assert f"{offer.plugin.name}: {offer.plugin.summary}" in blocks[names]
        assert ("placements" in blocks[names]) == (offer.plugin.facts is not None)
    lines = blocks["Qwen2_5_VLForConditionalGeneration"].splitlines()
    facts = {name.strip(): fact for name, _, fact in (x.strip().partition("  ") for x in lines)}
    assert facts["positions before the LLM"].strip() == "original"
    assert "ReceivedAttention" in facts["signals of the tower"]
    assert "tile (per='crop')" in blocks["InternVLForConditionalGeneration"]


def test_a_line_says_what_is_needed(tokenprune: Command) -> None:
    output = tokenprune("list").output
    assert "; reads ClsAttention  [tokenprune-vlm]" in output
    assert "; reads scores  [tokenprune-vlm]" in output
    assert "; for LlavaForConditionalGeneration  [tokenprune-vlm]" in output


def test_recipes_show_paper_spec_and_difference(tokenprune: Command) -> None:
    output = tokenprune("list", "--recipes").output
    for offer in registry().recipes:
        plugin = offer.plugin
        for words in (plugin.name, plugin.paper, plugin.expand(), plugin.differs):
            assert words in output


def test_markdown_is_the_table_of_the_documentation(tokenprune: Command) -> None:
    assert tokenprune("list", "--markdown").output.strip() == markdown(registry())


def test_version(tokenprune: Command) -> None:
    assert tokenprune("--version").output == f"tokenprune {__version__}\n"


@dataclass(frozen=True)
class Needy(Reducer):
    """A reducer that cannot be made without arguments, and has no budget."""

    grid: tuple[int, int]

    def plan(self, tokens: VisualTokens, scores: object, signals: Signals) -> Plan:
        return Plan.identity(tokens.mask)


@pytest.fixture
def third_party() -> Registry:
    return Registry(
        scorers=[Offer(ScorerPlugin("a", "a | b", RandomScorer, "someone"), "their-package")],
        reducers=[
            Offer(ReducerPlugin("needy", "asks", Needy), "their-package"),
            Offer(ReducerPlugin("evict", "drops", Evict), "tokenprune"),
        ],
        recipes=[
            Offer(RecipePlugin("r", "is", "a | evict({keep})", {"keep": 3}, "p"), "their-package")
        ],
        broken={"bad": RuntimeError("no")},
    )


def test_a_third_party_is_listed_with_its_name(
    third_party: Registry, monkeypatch: pytest.MonkeyPatch, tokenprune: Command
) -> None:
    monkeypatch.setattr(listing, "registry", lambda: third_party)
    output = tokenprune("list").output
    assert "asks; reads depends on its arguments  [their-package]" in output
    assert "broken: bad: no" in output


def test_bars_do_not_break_the_table(third_party: Registry) -> None:
    steps, recipes = markdown(third_party).split("\n\n")
    assert r"| scorer | `a` | a \| b |  | someone |" in steps.splitlines()
    assert r"| `r` | `a \| evict(3)` | p |" in recipes.splitlines()


def test_the_catalogue_makes_reducers_with_a_budget(third_party: Registry) -> None:
    needs = {line.name: line.needs for line in catalogue(third_party)}
    assert needs["evict"] == "scores"
    assert needs["r"] == "a | evict(3)"
    assert Evict(Keep(3)) == Evict(3)


def test_a_clash_of_names_is_marked_on_both_sides(
    monkeypatch: pytest.MonkeyPatch, tokenprune: Command
) -> None:
    clash = Registry(
        scorers=[Offer(ScorerPlugin("mine", "one", RandomScorer), "dist-a")],
        recipes=[Offer(RecipePlugin("mine", "another", "random | evict(3)"), "dist-b")],
    )
    monkeypatch.setattr(listing, "registry", lambda: clash)
    output = tokenprune("list").output
    assert "NAME CLASH with a recipe of dist-b: neither works by name  [dist-a]" in output
    assert "NAME CLASH with a scorer of dist-a: neither works by name  [dist-b]" in output


def test_lines_fit_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    held = io.StringIO()
    terminal = Console(file=held, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(listing, "console", lambda: terminal)
    listing.show_offers()
    lines = held.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if line.startswith("  cls-attention ")]
