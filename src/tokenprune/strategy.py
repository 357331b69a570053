"""Scorers, reducers, and the `Strategy` that composes them.

VisualTokens + Signals --Scorer--> scores --Reducer--> Plan --apply--> VisualTokens
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from torch import Tensor

from .errors import SpecError
from .idle_steps import check_budgets_fall, check_no_repetition, check_scores_are_read
from .kept_patches import Origin
from .placement import Placement
from .plan import Plan
from .precision import full_precision
from .signals import Signal, Signals
from .step_results import check_declared, check_plan, check_scores
from .tokens import VisualTokens


class Scorer(ABC):
    """Scorer: says how important each visual token is. Implementations are frozen dataclasses.

    Attributes:
        exempt: optional promises of the contract that it leaves out, by number, with reasons:
            ``{"S5": "it looks at the place of a token"}``.
    """

    exempt: ClassVar[Mapping[str, str]] = MappingProxyType({})

    @property
    def signals(self) -> frozenset[Signal]:
        """What `score` reads. Nothing else may be read."""
        return frozenset()

    @abstractmethod
    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        """`(batch, tokens)` float32 scores; higher = keep. +inf and -inf are legal, NaN is not."""


class Reducer(ABC):
    """Decides which tokens stay or merge. Implementations are frozen dataclasses.

    Attributes:
        needs_scores: True for one that cannot do without a scorer before it.
        keeps_highest: True for one that keeps the tokens with the highest scores, as many as its
            budget says, so that one of a larger budget right before it is refused.
        exempt: optional promises of the contract that it leaves out, by number, with reasons:
            ``{"P8": "it looks at neighbours"}``. One without P3 does not keep its budget exactly.
    """

    exempt: ClassVar[Mapping[str, str]] = MappingProxyType({})
    needs_scores: ClassVar[bool] = False
    keeps_highest: ClassVar[bool] = False

    @property
    def ignores_scores(self) -> bool:
        """True where no score can change what `plan` decides: a scorer for it alone is refused."""
        return False

    @property
    def signals(self) -> frozenset[Signal]:
        """What `plan` reads. Nothing else may be read."""
        return frozenset()

    @abstractmethod
    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        """The decision, as data.

        Args:
            tokens: a padded batch of visual tokens.
            scores: `(batch, tokens)` float32, higher = keep, anything on padding; None where no
                scorer came before.
            signals: holds what `signals` asks for.
        """


@dataclass(frozen=True, eq=False)
class Reduction:
    """Reduction: what a strategy did to a batch.

    Attributes:
        tokens: the reduced visual tokens.
        plan: all steps as one plan, with respect to the input.
        scores: `(batch, tokens)` float32 of the first scorer on the input, or None.
        patches: `(batch, tokens)` int64, the `patches` of the input, -1 where a row is padded;
            an `Origin` tells which crop (or frame) and patch they mean.
        origins: what each row shows, where a model was asked; `Attachment.last` tells it.
    """

    tokens: VisualTokens
    plan: Plan
    scores: Tensor | None = None
    patches: Tensor | None = None
    origins: tuple[Origin, ...] = ()


@dataclass(frozen=True, init=False)
class Strategy:
    """Steps in order: a scorer gives scores, each reducer after it may read them.

    Later reducers see tokens, scores and signals already reduced by the earlier ones.

    Args:
        steps: scorers and reducers; the last must be a reducer.

    Raises:
        SpecError: steps that cannot work in this order, or one of which has no effect.
    """

    steps: tuple[Scorer | Reducer, ...]

    def __init__(self, *steps: Scorer | Reducer) -> None:
        object.__setattr__(self, "steps", steps)
        scored = False
        for step in steps:
            if isinstance(step, type) and issubclass(step, (Scorer, Reducer)):
                raise SpecError(
                    f"a step is an instance, got the class {step.__name__}: write "
                    f"{step.__name__}(...)"
                )
            if not isinstance(step, (Scorer, Reducer)):
                raise SpecError(f"a step must be a Scorer or a Reducer, got {step!r}")
            check_declared(step)
            needs = isinstance(step, Reducer) and step.needs_scores and not step.ignores_scores
            if needs and not scored:
                raise SpecError(
                    f"{type(step).__name__} ranks tokens by scores, but no scorer stands before "
                    f"it; try Strategy(ClsAttentionScorer(), {type(step).__name__}(...))"
                )
            scored = scored or isinstance(step, Scorer)
        if not steps or not isinstance(steps[-1], Reducer):
            raise SpecError(
                "a strategy ends with a reducer (evict, ...), got "
                + (", ".join(type(step).__name__ for step in steps) or "no steps")
            )
        check_scores_are_read(steps, [isinstance(step, Scorer) for step in steps])
        check_budgets_fall([step for step in steps if isinstance(step, Reducer)])
        check_no_repetition(steps)

    @property
    def signals(self) -> frozenset[Signal]:
        """Everything that the steps read."""
        return frozenset().union(*(step.signals for step in self.steps))

    def at(self, placement: Placement) -> Stage:
        """This strategy at a place in a model."""
        return Stage(self, placement)

    def __call__(self, tokens: VisualTokens, signals: Signals | None = None) -> Reduction:
        """Run the steps on `tokens`. Each sees the signals that it declares, and no others.

        Raises:
            MissingSignalError: a step reads a signal that it does not declare, or declares one
                that is not in `signals`.
            ScoreError: a scorer returned NaN on a real token.
            ShapeError: a signal has the wrong axes, or a step returned something else than it must.
        """
        signals = Signals() if signals is None else signals
        signals.check(tokens.mask)
        with full_precision(tokens.features.device):
            return self._run(tokens, signals)

    def _run(self, tokens: VisualTokens, signals: Signals) -> Reduction:
        plan: Plan | None = None
        patches = tokens.patches.masked_fill(~tokens.mask, -1)
        scores = first = None
        for number, step in enumerate(self.steps, start=1):
            if isinstance(step, Scorer):
                scores = check_scores(step, step.score(tokens, signals.only(step.signals)), tokens)
                first = scores if first is None and plan is None else first
                continue
            seen = signals.only(step.signals)
            decided = check_plan(step, step.plan(tokens, scores, seen), tokens)
            plan = decided if plan is None else plan.then(decided)
            if decided.is_identity:
                continue
            tokens = tokens.reduce(decided)
            if number < len(self.steps):
                signals = signals.reduce(decided)
                scores = None if scores is None else decided(scores)
        assert plan is not None
        return Reduction(tokens, plan, first, patches)


@dataclass(frozen=True)
class Stage:
    """Stage: a strategy at a placement, which `attach` installs."""

    strategy: Strategy
    placement: Placement

    def __post_init__(self) -> None:
        self.placement.check(self.strategy.steps)
