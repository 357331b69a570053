"""Scores of several scorers, noted in the passes of one attachment that drops nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attachment import attach
from ..errors import ShapeError, SpecError
from ..placement import BeforeLLM, Placement
from ..plugins import registry
from ..reducers import Evict
from ..scorers import ClsAttentionScorer
from ..signals import Signal, Signals
from ..spec import parse_schedule, shown
from ..strategy import Scorer, Stage, Strategy
from ..tokens import VisualTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Scored:
    """A scorer, what to call it, and where it acts."""

    label: str
    scorer: Scorer
    placement: Placement


def cls_ensembles(model: PreTrainedModel, most: int = 5) -> tuple[Scored, ...]:
    """[CLS] attention ensembled over the last K layers, K = 1 up to `most` or all there are."""
    for layers in range(most, 0, -1):
        found = tuple(scored(ClsAttentionScorer(layers=k)) for k in range(1, layers + 1))
        try:
            attach(model, *looks_of(found)[0]).detach()
        except ShapeError:  # a tower of fewer layers
            continue
        return found
    return ()


def scorer_of(spec: str) -> tuple[Scorer, Placement]:
    """The scorer that `spec` names, or that its stage starts with, and where it acts.

    >>> scorer_of("cls-attention(layers=1)")[0] == scorer_of("fastervlm(keep=64)")[0]
    True

    Raises:
        SpecError: not one stage, or one that does not start with a scorer.
        UnknownNameError: a name that no plugin offers.
    """
    before, at, place = spec.partition("@")
    known = registry()
    alone = known.named(known.scorers, before.partition("(")[0].strip(), "scorer")
    if alone is not None and "|" not in before:
        spec = f"{before} | evict(1.0) {at} {place}"
    stages = parse_schedule(spec)
    first = stages[0].strategy.steps[0]
    if len(stages) != 1 or not isinstance(first, Scorer):
        names = ", ".join(known.names(known.scorers))
        raise SpecError(f"{spec!r} does not start with a scorer; scorers: {names}")
    return first, stages[0].placement


def scored(given: str | Scorer | Stage) -> Scored:
    """Label, scorer and placement of what a user gave."""
    if isinstance(given, str):
        scorer, placement = scorer_of(given)
        return Scored(given, scorer, placement)
    if isinstance(given, Scorer):
        return Scored(shown(given), given, BeforeLLM())
    first = given.strategy.steps[0]
    if not isinstance(first, Scorer):
        raise SpecError(f"{shown(given)!r} does not start with a scorer")
    return Scored(shown(given), first, given.placement)


class Look(Scorer):
    """Scores by several scorers, which are kept, and says nothing itself."""

    def __init__(self, given: Sequence[Scored]) -> None:
        self.given = given
        self.seen: list[tuple[VisualTokens, dict[str, Tensor]]] = []

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset().union(*(each.scorer.signals for each in self.given))

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        scores = {each.label: each.scorer.score(tokens, signals) for each in self.given}
        self.seen.append((tokens, scores))
        return torch.zeros_like(tokens.mask, dtype=torch.float32)

    def __repr__(self) -> str:
        return " + ".join(each.label for each in self.given)


def looks_of(given: Sequence[Scored]) -> tuple[list[Stage], list[Look]]:
    """Stages that keep every token, one for each placement."""
    places = dict.fromkeys(each.placement for each in given)
    looks = [Look([each for each in given if each.placement == place]) for place in places]
    stages = [
        Strategy(look, Evict(1.0)).at(place) for look, place in zip(looks, places, strict=True)
    ]
    return stages, looks
