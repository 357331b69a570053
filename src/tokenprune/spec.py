"""Specs: ``"cls-attention | evict(128) @ before-llm"`` and the way back.

    schedule := stage (";" stage)*
    stage    := step ("|" step)* ["@" placement]   |   recipe ["@" placement]
    step     := name ["(" arguments ")"]           arguments are Python literals

Specs are sugar for objects; they never grow variables or conditions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from itertools import chain
from typing import TypeVar

from .errors import SpecError, TokenpruneError, UnknownNameError
from .fields import check_types
from .grammar import Call, StageText, split, stage_texts
from .placement import AfterLayer, BeforeLLM, Placement
from .plugins import ReducerPlugin, ScorerPlugin, registry
from .strategy import Reducer, Scorer, Stage, Strategy

PLACEMENTS: dict[str, type[Placement]] = {"before-llm": BeforeLLM, "after-layer": AfterLayer}

T = TypeVar("T")


def parse(spec: str) -> Stage:
    """The stage that `spec` describes; without "@" it stands before the LLM.

    Raises:
        SpecError: not of the form above, or arguments that a step refuses.
        UnknownNameError: a name that no plugin offers; lists the known ones.

    >>> parse("cls-attention | evict(128)") == parse("vtc-cls(keep=128)")
    True
    """
    stages = parse_schedule(spec)
    if len(stages) != 1:
        raise SpecError(f"{spec!r} has {len(stages)} stages; use parse_schedule")
    return stages[0]


def parse_schedule(spec: str) -> tuple[Stage, ...]:
    """All stages of a spec with ";" between them, or of a recipe that expands to several."""
    return tuple(stage for text in stage_texts(spec) for stage in _stages(text, spec, True))


def stages_of(stages: Iterable[Stage | str]) -> tuple[Stage, ...]:
    """The stages themselves, and those that specs among them describe.

    Raises:
        SpecError: something is neither a stage nor a spec.
    """
    found: list[Stage] = []
    for stage in stages:
        if isinstance(stage, str):
            found += parse_schedule(stage)
        elif isinstance(stage, Stage):
            found.append(stage)
        else:
            raise SpecError(
                f"a stage must be a spec or a Stage, got {stage!r}; place a strategy with "
                "strategy.at(BeforeLLM())"
            )
    return tuple(found)


def spec_of(value: Stage | Strategy | Placement | Scorer | Reducer) -> str:
    """The spec that describes `value`: `parse(spec_of(stage)) == stage`.

    >>> spec_of(parse("cls-attention(layers=1) | evict(0.25)"))
    'cls-attention(layers=1) | evict(0.25) @ before-llm'
    """
    if isinstance(value, Stage):
        return f"{spec_of(value.strategy)} @ {spec_of(value.placement)}"
    if isinstance(value, Strategy):
        return " | ".join(map(spec_of, value.steps))
    return _name_of(value) + _arguments_of(value)


def shown(value: Stage | Strategy | Placement | Scorer | Reducer) -> str:
    """For people: the spec of `value`; what no plugin offers stands in it as its repr.

    >>> from tokenprune import Evict, Scorer
    >>> @dataclasses.dataclass(frozen=True)
    ... class MyScorer(Scorer):
    ...     strength: float = 2.0
    ...     def score(self, tokens, signals):
    ...         return tokens.sizes
    >>> shown(Strategy(MyScorer(), Evict(64)).at(BeforeLLM()))
    'MyScorer(strength=2.0) | evict(64) @ before-llm'
    """
    if isinstance(value, Stage):
        return f"{shown(value.strategy)} @ {shown(value.placement)}"
    if isinstance(value, Strategy):
        return " | ".join(map(shown, value.steps))
    try:
        return spec_of(value)
    except SpecError:
        return repr(value)


def _stages(
    text: StageText, spec: str, recipes: bool, elsewhere: Placement | None = None
) -> list[Stage]:
    """The stages of `text`, a recipe if `recipes` may be named; all at `elsewhere` if given."""
    placement = None if text.placement is None else _placement(text.placement, spec)
    first, *more = text.steps
    expanded = _expand(first) if recipes and not more else None
    if expanded is None:
        strategy = Strategy(*(_step(call, spec) for call in text.steps))
        return [Stage(strategy, elsewhere or placement or BeforeLLM())]
    parts = stage_texts(expanded)
    if placement is not None:
        if len(parts) > 1:
            raise SpecError(f"{first.name!r} is a schedule with placements of its own, in {spec!r}")
        _check_not_overruled(first, expanded, spec)
    return [stage for each in parts for stage in _stages(each, expanded, False, placement)]


def _check_not_overruled(call: Call, expanded: str, spec: str) -> None:
    """Refuse arguments of a recipe that decide on the placement that another one replaces."""
    known = registry()
    recipe = known.named(known.recipes, call.name, "recipe")
    assert recipe is not None
    own, usual = (split(each, "@", each)[1:] for each in (expanded, recipe.expand()))
    if own != usual:
        raise SpecError(
            f"{spec!r} has two placements: arguments of {call.name!r} ask for @{own[0]}, and it is "
            "followed by another one; give one of them"
        )


def _expand(call: Call) -> str | None:
    """The spec of the recipe that `call` names, or None where it names a step."""
    known = registry()
    recipe = known.named(known.recipes, call.name, "recipe")
    if recipe is None:
        return None
    placed = list(recipe.defaults)[: len(call.positional)]
    wrong = [name for name in call.named if name not in recipe.defaults or name in placed]
    if wrong or len(call.positional) > len(recipe.defaults):
        if known.named(known.reducers, call.name, "reducer") is not None:
            return None
        raise SpecError(
            f"recipe {call.name!r} takes {', '.join(recipe.defaults) or 'no arguments'}, got "
            + ", ".join([*map(repr, call.positional), *call.named])
        )
    return recipe.expand(*call.positional, **call.named)


def _step(call: Call, spec: str) -> Scorer | Reducer:
    known = registry()
    plugin = known.named(known.scorers, call.name, "scorer") or known.named(
        known.reducers, call.name, "reducer"
    )
    if plugin is None:
        recipe = known.named(known.recipes, call.name, "recipe")
        if recipe is not None:
            raise SpecError(
                f"{call.name!r} is a recipe and stands alone; in {spec!r} write its steps out: "
                f"{recipe.expand()}"
            )
        names = {
            *known.names(known.scorers),
            *known.names(known.reducers),
            *known.names(known.recipes),
        }
        raise UnknownNameError(
            f"unknown strategy {call.name!r} in {spec!r}; known: {', '.join(sorted(names))}"
            + known.broken_hint
        )
    return _build(plugin.factory, call)


def _placement(call: Call, spec: str) -> Placement:
    if call.name not in PLACEMENTS:
        raise UnknownNameError(
            f"unknown placement {call.name!r} in {spec!r}; known: {', '.join(PLACEMENTS)}"
        )
    return _build(PLACEMENTS[call.name], call)


def _build(factory: type[T], call: Call) -> T:
    try:
        made = factory(*call.positional, **call.named)
    except TokenpruneError:
        raise
    except Exception as error:  # of a third party's `__post_init__`, too
        fields = ", ".join(f.name for f in dataclasses.fields(factory)) or "no arguments"  # type: ignore[arg-type]
        raise SpecError(f"{call.name} takes {fields}: {error}") from error
    check_types(call.name, made)
    return made


def _name_of(value: object) -> str:
    known = registry()
    for name, placement in PLACEMENTS.items():
        if type(value) is placement:
            return name
    plugins = [o.plugin for o in known.scorers], [o.plugin for o in known.reducers]
    for plugin in chain[ScorerPlugin | ReducerPlugin](*plugins):
        if type(value) is plugin.factory:
            return plugin.name
    raise SpecError(f"{value!r} has no name in a spec: no installed plugin offers its class")


def _arguments_of(value: object) -> str:
    """Fields without a default by place, the others by name where they differ from it."""
    shown = []
    for field in dataclasses.fields(value):  # type: ignore[arg-type]
        given = getattr(value, field.name)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            shown.append(repr(given))
        # Compared as written, because 1 == 1.0 == True but a budget of 1 is not one of 1.0.
        elif repr(given) != repr(
            field.default_factory()
            if field.default_factory is not dataclasses.MISSING
            else field.default
        ):
            shown.append(f"{field.name}={given!r}")
    return f"({', '.join(shown)})" if shown else ""
