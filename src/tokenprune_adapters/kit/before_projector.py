"""Reduction between vision tower and projector, which then projects kept tokens alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenprune.errors import MissingSignalError, UnsupportedError
from tokenprune.hooks import NotCopyable, Removable
from tokenprune.observation import Observation
from tokenprune.report import Record
from tokenprune.signals import Signal, Signals
from tokenprune.strategy import Strategy
from tokenprune.tokens import VisualTokens
from tokenprune.untraced import untraced

from .budget_rows import BudgetRows
from .carry import carried, carry
from .marks import spread


@dataclass(frozen=True)
class Ids(Signal):
    """Signal of `VisualTokens.ids`: which picture it is, whatever its features look like."""

    axes: ClassVar[str] = "batch"


@dataclass(frozen=True)
class Sizes(Signal):
    """Signal of `VisualTokens.sizes`, where tokens were merged before."""

    axes: ClassVar[str] = "batch tokens"


class ReduceBeforeProjector(NotCopyable):
    """Pair of hooks on a projector: only kept tokens are projected; the rest comes out as marks.

    Args:
        strategy: strategy for the tokens of each image; None keeps them all.
        observation: latest pass of the tower.
        record: where to note what was done.
        later: function that takes projected features and what is known of the images, for stages
            inside the language model, which then count the tokens; or None.
        arrange: how tokens of crops form rows that share a budget; None where a crop is a row.
    """

    def __init__(
        self,
        strategy: Strategy | None,
        observation: Observation,
        record: Record,
        later: Callable[[Tensor, Signals], None] | None = None,
        arrange: Callable[[], BudgetRows] | None = None,
    ) -> None:
        self.strategy = strategy
        self.observation = observation
        self.record = record
        self.later = later
        self.arrange = arrange

    def install(self, projector: nn.Module) -> Iterator[Removable]:
        """Yield the handles."""
        yield projector.register_forward_pre_hook(self.before)
        yield projector.register_forward_hook(self.after)

    def before(self, projector: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.strategy is None:
            return (carry(args[0], _Left(None, args[0])), *args[1:])
        return self._reduce(self.strategy, args)

    @untraced
    def _reduce(self, strategy: Strategy, args: tuple[Any, ...]) -> tuple[Any, ...]:
        features: Tensor = args[0]
        seen, signals = self._seen(features)
        with self.record.selecting(features.device):
            rows = self._rows(features)
            tokens, signals = rows.tokens(features, seen.given_ids), rows.signals(signals)
            reduction = strategy(tokens, signals)
        self.record.decided(reduction, rows.origins)
        plan = reduction.plan
        if self.later is None:
            self.record.counted(tokens.lengths, {0: plan.lengths}, rows.origins)
        if plan.members is None and plan.lengths == tokens.lengths:
            return (carry(features, _Left(None, self._known(tokens, signals))), *args[1:])
        kept = rows.index.gather(1, plan.anchors), plan.mask, (features.shape[0], features.shape[1])
        known = self._known(reduction.tokens, signals.reduce(plan))
        return (carry(reduction.tokens.features, _Left(kept, known)), *args[1:])

    def _rows(self, features: Tensor) -> BudgetRows:
        if self.arrange is None:
            return BudgetRows.of_crops(features)
        return self.arrange().to(features.device)

    def _seen(self, features: Tensor) -> tuple[VisualTokens, Signals]:
        if not self.observation.ready:
            raise MissingSignalError(
                "the projector ran without the vision tower, so there are no scores to reduce by; "
                "pass pixel_values, or detach to project features of your own"
            )
        seen, signals = self.observation.take()
        _check_same(features, seen.features)
        return seen, signals

    def after(self, projector: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        left = carried(args[0])
        if not isinstance(left, _Left):
            return None
        features = output if left.kept is None else spread(output, *left.kept)
        if self.later is not None:
            self._leave(self.later, features, left.known)
        return features

    @untraced
    def _leave(
        self, later: Callable[[Tensor, Signals], None], features: Tensor, known: Signals | Tensor
    ) -> None:
        if isinstance(known, Signals):
            later(features, known)
        elif self.observation.ready:
            seen, signals = self.observation.take()
            if signals:
                _check_same(known, seen.features)
            rows = self._rows(known)
            tokens = rows.tokens(known, seen.given_ids)
            later(features, self._known(tokens, rows.signals(signals)))

    def _known(self, tokens: VisualTokens, signals: Signals) -> Signals:
        """What stages inside the language model may want to know of images."""
        if self.later is None:
            return signals
        return Signals({**signals, Ids(): tokens.ids, Sizes(): tokens.sizes})


@dataclass(frozen=True, eq=False)
class _Left:
    """Value that the hook before the projector leaves for the hook after it.

    Attributes:
        kept: where each row that is projected belongs (see `marks.spread`); None: as it stands.
        known: what stages inside the language model may want to know; features, where the tower
            has not been asked yet.
    """

    kept: tuple[Tensor, Tensor, tuple[int, int]] | None
    known: Signals | Tensor


def other_layer() -> UnsupportedError:
    """Features that are not those of the configured layer or layers."""
    return UnsupportedError(
        "the features are not those of the configured vision_feature_layer; set it in the model's "
        "config before attaching instead of passing it to a call"
    )


def _check_same(features: Tensor, seen: Tensor) -> None:
    """Refuse features of another layer, or with another number of tokens, than was observed."""
    if features.shape[:2] != seen.shape[:2]:
        raise UnsupportedError(
            f"the projector gets {features.shape[1]} tokens per image where the tower has "
            f"{seen.shape[1]} patches; the configured vision_feature_select_strategy cannot be "
            "changed in a call"
        )
    if features.shape[2] != seen.shape[2]:
        return  # several layers, concatenated, which `same_layers` checks
    same_memory = features.device == seen.device and features.data_ptr() == seen.data_ptr()
    if not same_memory and not torch.equal(features, seen.to(features.device)):
        raise other_layer()
