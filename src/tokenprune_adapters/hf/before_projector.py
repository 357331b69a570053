"""Reduction between tower and projector, of models whose projector works token by token."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from tokenprune.adapter import TowerAdapter
from tokenprune.errors import AttachError, UnsupportedError
from tokenprune.hooks import NotCopyable, Removable
from tokenprune.observation import Observation
from tokenprune.plugins import registry
from tokenprune.report import Record
from tokenprune.signals import Signal, Signals
from tokenprune.strategy import Strategy

from ..kit.before_projector import ReduceBeforeProjector, other_layer
from ..kit.budget_rows import BudgetRows
from .anatomy import Anatomy
from .family import Encoded, Sight
from .names import Call
from .picture_rows import PictureRow, before_projector


class BeforeProjector(NotCopyable):
    """Reduction of features as a tower gives them: only kept ones are projected.

    Args:
        parts: the parts of the model.
        sights: the kinds of picture that it takes.
        strategy: for the tokens of each row; None keeps them all.
        record: where to note what was done.
        followed: whether stages follow inside the language model.
        signals: what is asked of the towers.
    """

    def __init__(
        self,
        parts: Anatomy,
        sights: tuple[Sight, ...],
        strategy: Strategy | None,
        record: Record,
        followed: bool,
        signals: frozenset[Signal],
    ) -> None:
        self.parts = parts
        self.sights = sights
        self.signals = signals
        self.observation = Observation()
        self._local = threading.local()
        later = self._known if followed else None
        self.reduce = ReduceBeforeProjector(strategy, self.observation, record, later, self._rows)

    def install(self) -> Iterator[Removable]:
        """Yield the handles."""
        for tower in self.parts.towers:
            yield from tower_adapter(tower).install(
                tower, self.signals, self.observation, self.parts.feature_layer
            )
        yield from self.reduce.install(self.parts.projector)

    def begin(self, sight: Sight, encoded: Encoded) -> None:
        """Pictures are going to be encoded."""
        self._refuse_other_layers(encoded.call)
        self._local.now = sight, encoded

    def __call__(
        self, sight: Sight, encoded: Encoded, raw: Any, rows: Sequence[PictureRow]
    ) -> tuple[Any, Signals]:
        """The output, which has marks already, and what is known of the tokens that are left."""
        return raw, self._local.__dict__.pop("known", Signals())

    def over(self) -> None:
        """Nothing is being encoded any more."""
        self._local.__dict__.clear()

    def _refuse_other_layers(self, call: Call) -> None:
        """What reaches the projector tells a layer by its values, but several are concatenated."""
        configured, asked = self.parts.feature_layers, call.feature_layer
        layers = tuple(asked) if isinstance(asked, (list, tuple)) else (asked,)
        if configured and asked is not None and layers != configured:
            raise other_layer()

    def _rows(self) -> BudgetRows | None:
        now: tuple[Sight, Encoded] | None = getattr(self._local, "now", None)
        if now is not None:
            return before_projector(*now)
        named = [sight.encode for sight in self.sights if sight.crops is not None]
        if named:
            raise AttachError(f"the projector ran outside of the model's own {' and '.join(named)}")
        return None

    def _known(self, features: Tensor, signals: Signals) -> None:
        self._local.known = signals


def tower_adapter(tower: nn.Module) -> TowerAdapter:
    """The adapter of the model's vision tower."""
    known = registry()
    return known.claiming(known.towers, tower, None).adapter()


def check_select_strategy(parts: Anatomy, has_cls: bool) -> None:
    """Refuse a model whose projector gets anything but all patches of a picture."""
    strategy, supported = parts.select_strategy, "default"
    does = "keeps [CLS] among the patches"
    if not has_cls:
        does, supported = f"drops the first patch of a {type(parts.towers[0]).__name__}", "full"
    if strategy != supported:
        raise UnsupportedError(
            f"vision_feature_select_strategy={strategy!r} {does}; only {supported!r} is supported"
        )
