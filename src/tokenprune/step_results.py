"""Results of steps, checked where they come back: a third party's slip is named at once.

What is looked at costs no host sync beyond the one for NaN: types, axes, dtypes, devices.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import ScoreError, ShapeError, SpecError
from .plan import Plan
from .signals import Signal
from .tokens import VisualTokens

if TYPE_CHECKING:
    from .strategy import Reducer, Scorer


def check_declared(step: Scorer | Reducer) -> frozenset[Signal]:
    """The signals that `step` declares.

    Raises:
        SpecError: `signals` is no collection of instances of `Signal`.
    """
    declared: object = step.signals
    if isinstance(declared, Iterable):
        declared = frozenset(declared)
        wrong = [each for each in declared if not isinstance(each, Signal)]
        if not wrong:
            return declared
        declared = wrong[0]
    raise SpecError(
        f"{named(step)} must declare instances of Signal, as in "
        f"`return frozenset({{ClsAttention(layers=1)}})` under @property, got {_shown(declared)}"
    )


def check_scores(scorer: Scorer, scores: object, tokens: VisualTokens) -> Tensor:
    """`scores`, if they are what `scorer` must return for `tokens`.

    Raises:
        ShapeError: no tensor, or one of other axes, dtype or device.
        ScoreError: NaN on a real token.
    """
    expected = tuple(tokens.mask.shape)
    right = isinstance(scores, Tensor) and tuple(scores.shape) == expected
    if not isinstance(scores, Tensor) or not right or scores.dtype != torch.float32:
        raise ShapeError(
            f"{named(scorer)} must return float32 scores with axes (batch tokens) = {expected}, "
            f"got {_shown(scores)}"
        )
    if scores.device != tokens.features.device:
        raise ShapeError(
            f"{named(scorer)} must return scores on {tokens.features.device}, got {scores.device}"
        )
    if bool((scores.isnan() & tokens.mask).any()):
        raise ScoreError(
            f"{named(scorer)} returned NaN, which cannot be ranked; look for overflow in "
            "the model (fp16 attention logits) or for a division by zero in the scorer"
        )
    return scores


def check_plan(reducer: Reducer, plan: object, tokens: VisualTokens) -> Plan:
    """`plan`, if it is what `reducer` must return for `tokens`.

    Raises:
        ShapeError: no plan, or one for other rows, another number of slots, or another device.
    """
    batch, slots = tokens.mask.shape
    if not isinstance(plan, Plan):
        hint = "; a mask of what stays becomes one by Plan.select(mask)"
        mask = isinstance(plan, Tensor) and plan.dtype == torch.bool
        raise ShapeError(
            f"{named(reducer)} must return a Plan, got {_shown(plan)}{hint if mask else ''}"
        )
    if (len(plan.anchors), plan.tokens) != (batch, slots):
        raise ShapeError(
            f"{named(reducer)} must return a plan for {batch} rows of {slots} slots, got one for "
            f"{len(plan.anchors)} rows of {plan.tokens}"
        )
    if plan.anchors.device != tokens.mask.device:
        raise ShapeError(
            f"{named(reducer)} must return a plan on {tokens.mask.device}, got one on "
            f"{plan.anchors.device}"
        )
    return plan


def named(step: Scorer | Reducer) -> str:
    """The class of `step`, with the name and distribution of the plugin that offers it."""
    from .plugins import registry

    known = registry()
    for offers in (known.scorers, known.reducers):
        for offer in offers:
            if offer.plugin.factory is type(step):
                return f"{type(step).__name__} ({offer.plugin.name!r} of {offer.origin})"
    return type(step).__name__


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__} instead of an instance"
    kind = type(value)
    where = f"{kind.__module__}." if kind.__module__ not in ("builtins", "__main__") else ""
    return "None" if value is None else f"{value!r:.60}, a {where}{kind.__name__}"
