"""Specs: the way back is the way there, and errors that help."""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from typing import Any, Literal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from core.fakes import SaysScorer, entry, installed, module_with
from tokenprune import (
    AfterLayer,
    BeforeLLM,
    BudgetError,
    ClsAttentionScorer,
    Evict,
    Keep,
    PluginError,
    RandomScorer,
    Reducer,
    ReducerPlugin,
    Scorer,
    ScorerPlugin,
    ShapeError,
    SpecError,
    Stage,
    Strategy,
    TokenpruneError,
    UniformScorer,
    UnknownNameError,
    parse,
    parse_schedule,
    spec_of,
)
from tokenprune.budget import Budgeted, KeepLike
from tokenprune.plugins import registry
from tokenprune.signals import Layers
from tokenprune.spec import PLACEMENTS

# ------------------------------------------------------------ generated stages: there and back


def _values(hint: Any) -> st.SearchStrategy[Any] | None:
    """Values for a field of this type, or None where we would have to guess."""
    if hint == KeepLike:
        counts = st.integers(0, 9999)
        return counts | st.floats(0, 1, exclude_min=True) | st.builds(Keep, counts)
    if hint == Layers:
        return st.integers(1, 24) | st.lists(
            st.integers(-24, 23), min_size=1, max_size=4, unique=True
        ).map(tuple)
    if typing.get_origin(hint) is Literal:
        return st.sampled_from(typing.get_args(hint))
    simple: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(0, 40),
        float: st.floats(0, 4),
        str: st.text(max_size=5),
        tuple[int, ...]: st.lists(st.integers(-9, 9), min_size=1, unique=True).map(tuple),
    }
    return simple.get(hint)


@st.composite
def built(draw: st.DrawFn, factory: type) -> Any:
    """An instance of a frozen dataclass, with any of its options set."""
    hints = typing.get_type_hints(factory)
    given_fields = {}
    for field in dataclasses.fields(factory):
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        values = _values(hints[field.name])
        if values is not None and (required or draw(st.booleans())):
            given_fields[field.name] = draw(values)
    try:
        return factory(**given_fields)
    except TokenpruneError:  # a value that this field refuses
        assume(False)


SCORERS = [offer.plugin.factory for offer in registry().scorers]
REDUCERS = [offer.plugin.factory for offer in registry().reducers]


@st.composite
def stages(draw: st.DrawFn) -> Stage:
    steps: list[Scorer | Reducer] = []
    for _ in range(draw(st.integers(1, 3))):
        reducer = draw(st.sampled_from(REDUCERS).flatmap(built))
        if not reducer.ignores_scores:  # a scorer for others would have no effect
            steps.append(draw(st.sampled_from(SCORERS).flatmap(built)))
        steps.append(reducer)
    placement = draw(st.sampled_from([*PLACEMENTS.values()]).flatmap(built))
    try:
        return Strategy(*steps).at(placement)
    except (BudgetError, SpecError):  # nothing left before the LLM, or to reduce
        assume(False)
        raise


@given(stages())
def test_parse_is_the_inverse_of_spec_of(stage: Stage) -> None:
    spec = spec_of(stage)
    assert parse(spec) == stage
    assert repr(parse(spec)) == repr(stage)  # 1, 1.0 and True are equal, but not the same
    assert spec_of(parse(spec)) == spec


@pytest.mark.parametrize("factory", [*SCORERS, *REDUCERS, *PLACEMENTS.values()])
@given(data=st.data())
def test_every_part_has_a_way_back(factory: type, data: st.DataObject) -> None:
    part = data.draw(built(factory))
    if isinstance(part, Scorer):
        stage = Strategy(part, Evict(5)).at(BeforeLLM())
    elif isinstance(part, Reducer):
        assume(not (isinstance(part, Budgeted) and part.keep == 0))
        before = [UniformScorer()] if part.needs_scores else []
        stage = Strategy(*before, part).at(BeforeLLM())
    else:
        stage = Strategy(UniformScorer(), Evict(5)).at(part)
    assert repr(parse(spec_of(stage))) == repr(stage)


@given(stages(), stages())
def test_schedules_are_stages_in_a_row(one: Stage, other: Stage) -> None:
    schedule = f"{spec_of(one)} ; {spec_of(other)}"
    assert parse_schedule(schedule) == (one, other)
    with pytest.raises(SpecError, match="has 2 stages; use parse_schedule"):
        parse(schedule)


@given(stages(), st.data())
def test_whitespace_does_not_matter(stage: Stage, data: st.DataObject) -> None:
    space = st.sampled_from(["", " ", "\n", "\t  "])

    def loose(text: str) -> str:
        return data.draw(space) + text + data.draw(space)

    steps = "|".join(loose(spec_of(step)) for step in stage.strategy.steps)
    assert parse(steps + "@" + loose(spec_of(stage.placement))) == stage


@given(st.text(max_size=8), st.lists(st.text("|;@()[]'\"\\ ,#", max_size=4), max_size=2))
def test_quoted_separators_are_text(text: str, more: list[str]) -> None:
    says = ScorerPlugin("says", "a text", SaysScorer)
    with installed(entry("p", module_with(scorers=[says]))):
        stage = Strategy(SaysScorer(text, tuple(more)), Evict(3)).at(AfterLayer())
        assert parse(spec_of(stage)) == stage
        assert parse_schedule(f"{spec_of(stage)};{spec_of(stage)}") == (stage, stage)


# --------------------------------------------------------------------------- single examples


@pytest.mark.parametrize(
    ("spec", "stage"),
    [
        ("random | evict(3)", Strategy(RandomScorer(), Evict(3)).at(BeforeLLM())),
        ("random()|evict(keep=3)", Strategy(RandomScorer(), Evict(3)).at(BeforeLLM())),
        (
            "cls-attention(layers=(-4, -3), ensemble='max') | evict(0.5, per='crop')",
            Strategy(ClsAttentionScorer((-4, -3), "max"), Evict(0.5, "crop")).at(BeforeLLM()),
        ),
        (
            "uniform | evict(0) @ after-layer(layers=15, positions='reindexed')",
            Strategy(UniformScorer(), Evict(0)).at(AfterLayer(15, "reindexed")),
        ),
        (
            "random(7) | evict(9) | uniform | evict(4) @ before-llm(positions='original')",
            Strategy(RandomScorer(7), Evict(9), UniformScorer(), Evict(4)).at(
                BeforeLLM("original")
            ),
        ),
    ],
)
def test_specs_say_what_the_objects_are(spec: str, stage: Stage) -> None:
    assert parse(spec) == stage


@pytest.mark.parametrize(
    ("value", "spec"),
    [
        (Strategy(ClsAttentionScorer(), Evict(128)), "cls-attention | evict(128)"),
        (Evict(0.25, "crop"), "evict(0.25, per='crop')"),
        (ClsAttentionScorer((20, 22), "min"), "cls-attention(layers=(20, 22), ensemble='min')"),
        (AfterLayer(), "after-layer"),
        (AfterLayer(15), "after-layer(layers=15)"),
        (BeforeLLM("original"), "before-llm(positions='original')"),
    ],
)
def test_specs_are_short(value: Strategy, spec: str) -> None:
    assert spec_of(value) == spec


def test_what_no_plugin_offers_has_no_spec() -> None:
    with pytest.raises(SpecError, match="has no name in a spec: no installed plugin offers"):
        spec_of(SaysScorer("hello"))


def test_one_and_one_point_zero_are_told_apart() -> None:
    """They are equal in Python, yet one keeps a token and the other all of them."""

    @dataclasses.dataclass(frozen=True)
    class KeepsAll(Evict):
        keep: KeepLike = 1.0

    plugin = ReducerPlugin("keeps-all", "a default of 1.0", KeepsAll)
    with installed(entry("p", module_with(reducers=[plugin]))):
        assert spec_of(KeepsAll()) == "keeps-all"
        assert spec_of(KeepsAll(1)) == "keeps-all(keep=1)"


# ------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("", SpecError, "a stage or step is missing in ''"),
        ("  ", SpecError, "a spec looks like 'cls-attention | evict(128) @ before-llm'"),
        ("random |", SpecError, "nothing stands on one side of '|' in 'random |'"),
        ("| evict(3)", SpecError, "nothing stands on one side of '|'"),
        ("random | | evict(3)", SpecError, "nothing stands on one side of '|'"),
        ("random | evict(3);", SpecError, "nothing stands on one side of ';'"),
        ("random | evict(3) @", SpecError, "nothing stands on one side of '@'"),
        ("@ before-llm", SpecError, "nothing stands on one side of '@'"),
        ("random|evict(3)@before-llm@after-layer", SpecError, "more than one placement ('@')"),
        ("random | evict(3) @ in-llm", UnknownNameError, "unknown placement 'in-llm'"),
        ("random|evict(3)@x", UnknownNameError, "known: before-llm, after-layer"),
        ("random | evict(3) @ after-layer(0)", SpecError, "layers must be an int >= 1, got 0"),
        ("random|evict(3)@after-layer(True)", SpecError, "layers must be an int >= 1, got True"),
        (
            "random|evict(3)@before-llm(positions='new')",
            SpecError,
            "positions must be 'reindexed' or 'original', got 'new'",
        ),
        ("random|evict(3)@before-llm(3, 4, 5)", SpecError, "before-llm takes positions"),
        ("evict 3", SpecError, "cannot read 'evict 3' in 'evict 3'; a step looks like evict(128)"),
        ("random|evict(3", SpecError, "cannot read 'evict(3'"),
        ("random|evict)3(", SpecError, "cannot read 'evict)3('"),
        ("3(evict)", SpecError, "cannot read '3(evict)'"),
        ("random | evict(n)", SpecError, "cannot read the arguments (n) of 'evict'"),
        ("random | evict(1 + n)", SpecError, "they must be Python literals, e.g. (128)"),
        ("random | evict(__import__('os'))", SpecError, "cannot read the arguments"),
        ("random | evict(1)(2)", SpecError, "more than one pair of parentheses"),
        ("random | evict(**{'keep': 3})", SpecError, "'**' is used"),
        ("random | evict(*[3])", SpecError, "cannot read the arguments (*[3])"),
        ("random | evict(keep=3, keep=4)", SpecError, "a name stands twice"),
        ("random | evict({[1]})", SpecError, "unhashable"),
        ("random | evict(3 # no)", SpecError, "cannot read the arguments"),
        ("random | evict('\0')", SpecError, "cannot read the arguments"),
        ("random | evict()", SpecError, "evict takes keep, per: "),
        ("random | evict(3, 'crop', 5)", SpecError, "evict takes keep, per: "),
        ("random | evict(ratio=3)", SpecError, "evict takes keep, per: "),
        ("uniform(3) | evict(3)", SpecError, "uniform takes no arguments: "),
        ("random(-1) | evict(3)", SpecError, "seed must be an int >= 0, got -1"),
        ("random(True) | evict(3)", SpecError, "seed must be an int >= 0, got True"),
        (
            "cls-attention(ensemble='mean') | evict(3)",
            SpecError,
            "ensemble must be 'avg', 'max' or 'min', got 'mean'",
        ),
        ("cls-attention(ensemble=[]) | evict(3)", SpecError, "got []"),
        ("cls-attention(layers=0) | evict(3)", ShapeError, "K >= 1, got 0"),
        ("random | evict(0)", BudgetError, "keep=0 leaves no visual token before the LLM"),
        ("random | evict(0)", BudgetError, "'evict(0) @ after-layer(15)'"),
        ("random | evict(-3)", BudgetError, "must be >= 0, got -3"),
        ("random | evict(1.5)", BudgetError, "must be in (0, 1], got 1.5"),
        ("random | evict(True)", BudgetError, "got True"),
        ("random | evict({3})", BudgetError, "got {3}"),
        ("evict(3)", SpecError, "Evict ranks tokens by scores, but no scorer stands before it"),
        ("evict(3)", SpecError, "try Strategy(ClsAttentionScorer(), Evict(...))"),
        ("cls-attention", SpecError, "a strategy ends with a reducer (evict, ...), got ClsAtt"),
        ("cls-attention | uniform", SpecError, "got ClsAttentionScorer, UniformScorer"),
    ],
)
def test_errors_say_what_is_wrong(spec: str, error: type[TokenpruneError], words: str) -> None:
    with pytest.raises(error) as caught:
        parse(spec)
    assert words in str(caught.value)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UnknownNameError) as caught:
        parse("nope|evict(3)")
    message = str(caught.value)
    assert message.startswith("unknown strategy 'nope' in 'nope|evict(3)'; known: ")
    listed = message.partition("known: ")[2].split(", ")
    assert listed == sorted(listed)
    known = registry()
    offers = [*known.scorers, *known.reducers, *known.recipes]
    assert set(listed) == {offer.plugin.name for offer in offers}
    assert {"cls-attention", "evict", "random", "uniform", "vtc-cls", "fastervlm"} <= set(listed)
    assert isinstance(caught.value, LookupError)


@given(st.text("ab-evict(128)|@;'\"=,. \\[]{}", max_size=25))
def test_any_text_is_read_or_refused_in_our_words(text: str) -> None:
    with contextlib.suppress(TokenpruneError):
        assert parse_schedule(text)


def test_a_broken_plugin_asked_for_by_name_says_why() -> None:
    def load() -> object:
        raise ImportError("no module named 'magic'")

    broken = entry("magic-scorer", None)
    broken.load = load
    with pytest.warns(UserWarning, match="magic-scorer"), installed(broken):  # noqa: SIM117
        with pytest.raises(PluginError, match="'magic-scorer' is broken: no module named 'magic'"):
            parse("magic-scorer | evict(3)")
