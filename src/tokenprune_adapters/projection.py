"""Reduce visual tokens between the vision tower and the projector."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.adapter import NotCopyable, Observation, Removable
from tokenprune.errors import MissingSignalError, UnsupportedError
from tokenprune.plan import Plan
from tokenprune.report import Record
from tokenprune.strategy import Strategy
from tokenprune.tokens import VisualTokens

from .carry import carried, carry
from .marks import spread


class ReduceBeforeProjector(NotCopyable):
    """Two hooks on a projector: only kept tokens are projected; the rest comes out as marks.

    Args:
        strategy: what to do with the tokens of each image.
        observation: the tower's latest pass.
        record: where to note what was done.
    """

    def __init__(self, strategy: Strategy, observation: Observation, record: Record) -> None:
        self.strategy = strategy
        self.observation = observation
        self.record = record

    def install(self, projector: nn.Module) -> Iterator[Removable]:
        """Yield the handles."""
        yield projector.register_forward_pre_hook(self.before)
        yield projector.register_forward_hook(self.after)

    def before(self, projector: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        features: Tensor = args[0]
        if not self.observation.ready:
            raise MissingSignalError(
                "the projector ran without the vision tower, so there are no scores to reduce by; "
                "pass pixel_values, or detach to project features of your own"
            )
        seen, signals = self.observation.take()
        _check_same(features, seen.features)
        with self.record.selecting(features.device):
            tokens = VisualTokens.of(features, ids=seen.ids.to(features.device))
            reduction = self.strategy(tokens, signals)
        self.record.reduced(reduction, tokens.lengths)
        if reduction.plan.is_identity:
            return None
        return (carry(reduction.tokens.features, reduction.plan), *args[1:])

    def after(self, projector: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        plan = carried(args[0])
        return spread(output, plan) if isinstance(plan, Plan) else None


def _check_same(features: Tensor, seen: Tensor) -> None:
    """Refuse features of another layer, or with another number of tokens, than was observed."""
    if features.shape[:2] != seen.shape[:2]:
        raise UnsupportedError(
            f"the projector gets {features.shape[1]} tokens per image where the tower has "
            f"{seen.shape[1]} patches; only vision_feature_select_strategy='default' is supported"
        )
    if features.shape[2] != seen.shape[2]:
        return  # several layers, concatenated; scores end at the last of them
    same_memory = features.device == seen.device and features.data_ptr() == seen.data_ptr()
    if not same_memory and not torch.equal(features, seen.to(features.device)):
        raise UnsupportedError(
            "the features are not those of the configured vision_feature_layer; set it in the "
            "model's config before attaching instead of passing it to a call"
        )
