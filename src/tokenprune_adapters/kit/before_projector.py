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
        arrange: function that says how tokens of crops form rows that share a budget, or None where
            a crop is a row; None where each always is.
    """

    def __init__(
        self,
        strategy: Strategy | None,
        observation: Observation,
        record: Record,
        later: Callable[[Tensor, Signals], None] | None = None,
        arrange: Callable[[], BudgetRows | None] | None = None,
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
        whole: Tensor = args[0]
        rows, features, (seen, signals) = self._arranged(whole)
        with self.record.selecting(features.device):
            tokens, signals = rows.tokens(features, seen.given_ids), rows.signals(signals)
            reduction = strategy(tokens, signals)
        self.record.decided(reduction, rows.origins)
        plan = reduction.plan
        if self.later is None:
            self.record.counted(tokens.lengths, {0: plan.lengths}, rows.origins)
        if plan.members is None and plan.lengths == tokens.lengths:
            # To the bit, the projector does what it always does.
            return (carry(whole, _Left(None, self._known(tokens, signals))), *args[1:])
        shape = features.shape[0], features.shape[1]
        known = self._known(reduction.tokens, signals.reduce(plan))
        kept, index = reduction.tokens.features, rows.index.gather(1, plan.anchors)
        left = _Left(_Kept(index, plan.mask, shape, rows.beside), known)
        if rows.beside:
            # One row of all tokens, those beside first: the projector does not care which is whose.
            kept = torch.cat([whole[:, : rows.beside].flatten(0, 1), kept.flatten(0, 1)])[None]
        return (carry(kept, left), *args[1:])

    def _arranged(self, whole: Tensor) -> tuple[BudgetRows, Tensor, tuple[VisualTokens, Signals]]:
        """The rows, the features of patches, and what was seen of them."""
        if not self.observation.ready:
            raise MissingSignalError(
                "the projector ran without the vision tower, so there are no scores to reduce by; "
                "pass pixel_values, or detach to project features of your own"
            )
        seen, signals = self.observation.take()
        arranged = None if self.arrange is None else self.arrange()
        features = whole if arranged is None else whole[:, arranged.beside :]
        if self.strategy is not None or signals:
            _check_same(features, seen.features)
        rows = BudgetRows.of_crops(features) if arranged is None else arranged.to(features.device)
        return rows, features, (seen, signals)

    def after(self, projector: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        left = carried(args[0])
        if not isinstance(left, _Left):
            return None
        features = output if left.kept is None else left.kept.spread(output)
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
            rows, patches, (seen, signals) = self._arranged(known)
            tokens = rows.tokens(patches, seen.given_ids)
            later(features, self._known(tokens, rows.signals(signals)))

    def _known(self, tokens: VisualTokens, signals: Signals) -> Signals:
        """What stages inside the language model may want to know of images."""
        if self.later is None:
            return signals
        return Signals({**signals, Ids(): tokens.ids, Sizes(): tokens.sizes})


@dataclass(frozen=True, eq=False)
class _Kept:
    """Where each row that is projected belongs.

    Attributes:
        index: see `marks.spread`.
        mask: see `marks.spread`.
        shape: number of crops, and number of patches of each.
        beside: tokens in front of the patches of each crop, all of which come first.
    """

    index: Tensor
    mask: Tensor
    shape: tuple[int, int]
    beside: int

    def spread(self, output: Tensor) -> Tensor:
        """`(crops, tokens, channels)`, with marks where nothing was kept."""
        if not self.beside:
            return spread(output, self.index, self.mask, self.shape)
        crops, channels = self.shape[0], output.shape[2]
        front, kept = output[0].tensor_split((crops * self.beside,))
        patches = spread(
            kept.reshape(*self.index.shape, channels), self.index, self.mask, self.shape
        )
        return torch.cat([front.reshape(crops, self.beside, channels), patches], dim=1)


@dataclass(frozen=True, eq=False)
class _Left:
    """Value that the hook before the projector leaves for the hook after it.

    Attributes:
        kept: where each row that is projected belongs; None: as it stands.
        known: what stages inside the language model may want to know; features, where the tower
            has not been asked yet.
    """

    kept: _Kept | None
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
