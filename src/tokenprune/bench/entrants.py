"""Entrants of a bench: methods at every budget, and the floors and controls beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..budget import Budgeted, Keep, Per
from ..errors import SpecError
from ..placement import BeforeLLM, Placement
from ..reducers import Evict, Pool
from ..scorers import ClsAttentionScorer, RandomScorer, UniformScorer
from ..signals import Signal, Signals
from ..spec import parse_schedule, shown, spec_of
from ..strategy import Reducer, Scorer, Stage, Strategy
from ..tokens import VisualTokens

Kind: TypeAlias = Literal["vanilla", "method", "floor", "control"]

BUDGET = "{keep}"
"""Where a spec with several budgets takes the one that is tried."""


@dataclass(frozen=True)
class Entrant:
    """Entrant: one line of a bench.

    Attributes:
        label: the method's name, the same for all its budgets.
        kind: "vanilla"; "method", what was asked for; "floor", which every method must beat;
            "control", what bounds a result: the oracle, inverted scores, no picture.
        keep: what stays, as asked: int = count, float = fraction; 1.0 for vanilla.
        stages: what to attach; empty for nothing.
        blind: show a gray picture instead.
    """

    label: str
    kind: Kind
    keep: int | float
    stages: tuple[Stage, ...] = ()
    blind: bool = False

    @property
    def spec(self) -> str | None:
        """What was attached, exactly; None for nothing."""
        return "; ".join(map(_described, self.stages)) or None

    @property
    def place(self) -> Placement | None:
        """Where it reduces first."""
        return self.stages[0].placement if self.stages else None

    @property
    def per(self) -> Per:
        """What its first budget is for."""
        steps = _steps(self.stages)
        return next((step.per for step in steps if isinstance(step, Budgeted)), "image")


@dataclass(frozen=True, eq=False)
class Given(Scorer):
    """Scores that someone else knows: those of the present batch, by patch.

    Attributes:
        rows: `(patches,)` float32 for each picture of the batch; set before each forward pass.
    """

    rows: list[Tensor] = field(default_factory=list, repr=False)

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        if len(self.rows) != len(tokens.mask):
            raise SpecError(f"scores of {len(self.rows)} pictures, but {len(tokens.mask)} came")
        known = pad_sequence(self.rows, batch_first=True).to(tokens.features.device)
        return known.gather(1, tokens.patches.clamp(max=known.shape[1] - 1))


@dataclass(frozen=True)
class Inverted(Scorer):
    """Inverted scorer: one that works must fall below random when it is turned round."""

    scorer: Scorer

    @property
    def signals(self) -> frozenset[Signal]:
        return self.scorer.signals

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        return -self.scorer.score(tokens, signals)


def enter(
    specs: Sequence[str], keeps: Sequence[int | float], oracle: Given | None = None
) -> list[Entrant]:
    """All lines of a bench: vanilla and blind, and for each budget methods, floors, controls.

    A budget of 1.0 is vanilla. Floors stand at every placement that a method uses, with a budget
    for what the method's is for: 128 tokens of each crop are more than 128 of the picture.

    Args:
        specs: recipes or specs with one budget, which is replaced; or with `{keep}` in its place.
            A schedule of several stages without it is tried as it stands.
        keeps: budgets to try.
        oracle: scorer that gives the oracle's scores; None for no oracle.

    Raises:
        SpecError, UnknownNameError, BudgetError: a spec or budget that cannot be used.
    """
    entrants = [Entrant("vanilla", "vanilla", 1.0), Entrant("blind", "control", 1.0, blind=True)]
    # Vanilla leaves first, since 1.0 would take the place of a budget of 1 token, its equal.
    kept = list(dict.fromkeys(k for k in keeps if not (isinstance(k, float) and k == 1)))
    whole = {spec: parse_schedule(spec) for spec in specs if not adjustable(spec)}
    for spec, stages in whole.items():
        entrants.append(Entrant(spec, "method", _first_budget(stages), stages))
    for keep in kept:
        methods = [
            Entrant(spec, "method", keep, with_budget(spec, keep))
            for spec in specs
            if spec not in whole
        ]
        entrants += methods
        places: dict[tuple[Placement, Per], None] = dict.fromkeys(
            (one.stages[0].placement, one.per) for one in methods
        )
        for place, per in places or {(BeforeLLM(), "image"): None}:
            after = "" if per == "image" else f" per {per}"
            after += "" if place == BeforeLLM() else f" @ {spec_of(place)}"
            budget = Keep(keep, per)
            inverted = Inverted(_to_invert(methods, place))
            for label, steps in (*_floors(budget), *_controls(budget, inverted, oracle)):
                kind: Kind = "control" if label in ("oracle", "inverted") else "floor"
                stage = Strategy(*steps).at(place)
                entrants.append(Entrant(label + after, kind, keep, (stage,)))
    return entrants


def _floors(keep: Keep) -> list[tuple[str, tuple[Scorer | Reducer, ...]]]:
    return [
        ("random", (RandomScorer(), Evict(keep))),
        ("uniform", (UniformScorer(), Evict(keep))),
        ("pool", (Pool(keep),)),
    ]


def _controls(
    keep: Keep, inverted: Inverted, oracle: Given | None
) -> list[tuple[str, tuple[Scorer | Reducer, ...]]]:
    controls: list[tuple[str, tuple[Scorer | Reducer, ...]]] = [
        ("inverted", (inverted, Evict(keep)))
    ]
    if oracle is not None:
        controls.append(("oracle", (oracle, Evict(keep))))
    return controls


def _to_invert(methods: Sequence[Entrant], place: Placement) -> Scorer:
    """The first scorer of a method that works at `place`: what is known before the LLM stays so."""
    scorers = (
        step
        for one in methods
        for step in _steps(one.stages[:1])
        if isinstance(step, Scorer) and (one.place == place or isinstance(one.place, BeforeLLM))
    )
    return next(scorers, ClsAttentionScorer())


def adjustable(spec: str) -> bool:
    """Whether a budget can be put into `spec`: it has a `{keep}`, or exactly one budget."""
    if BUDGET in spec:
        return True
    stages = parse_schedule(spec)
    return len(stages) == 1 and sum(map(_has_budget, _steps(stages))) == 1


def with_budget(spec: str, keep: int | float) -> tuple[Stage, ...]:
    """The stages of `spec` with another budget.

    >>> from tokenprune import spec_of
    >>> [spec_of(stage) for stage in with_budget("vtc-cls", 64)]
    ['cls-attention | evict(64) @ before-llm']
    """
    if BUDGET in spec:
        return parse_schedule(spec.replace(BUDGET, repr(keep)))
    (stage,) = parse_schedule(spec)
    steps = (_changed(step, keep) if _has_budget(step) else step for step in stage.strategy.steps)
    return (Strategy(*steps).at(stage.placement),)


def _described(stage: Stage) -> str:
    """A spec; steps that only a bench knows are named as well."""
    steps = " | ".join(map(_name, stage.strategy.steps))
    return f"{steps} @ {spec_of(stage.placement)}"


def _name(step: Scorer | Reducer) -> str:
    if isinstance(step, Inverted):
        return f"inverted({_name(step.scorer)})"
    return "oracle" if isinstance(step, Given) else shown(step)


def _steps(stages: Sequence[Stage]) -> list[Scorer | Reducer]:
    return [step for stage in stages for step in stage.strategy.steps]


def _has_budget(step: Any) -> bool:
    fields: Any = dataclasses.fields
    return isinstance(step, Reducer) and "keep" in [each.name for each in fields(step)]


def _changed(step: Any, keep: int | float) -> Reducer:
    changed: Reducer = dataclasses.replace(step, keep=keep)
    return changed


def _first_budget(stages: Sequence[Stage]) -> int | float:
    steps: list[Any] = [step for step in _steps(stages) if _has_budget(step)]
    return next((step.keep for step in steps if step.keep is not None), 1.0)
