"""Adapters connect strategies to models: what they implement, and what core gives them.

A `TowerAdapter` reads signals from a vision tower without changing what it returns. A
`ModelAdapter` puts stages to work in a whole model, and may tell what its language model attends
to. All install hooks by yielding every handle as it is made; core removes them, also when an
installation fails half-way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import ClassVar

from torch import nn

from .errors import UnsupportedError
from .hooks import Removable
from .observation import Attended, Observation
from .placement import Placement
from .report import Record
from .signals import Signal
from .strategy import Stage


class TowerAdapter(ABC):
    """Adapter that reads signals from a kind of vision tower, by hooks that change nothing."""

    @abstractmethod
    def provides(self, tower: nn.Module) -> frozenset[type[Signal]]:
        """The kinds of signal that `tower` can give."""

    @abstractmethod
    def install(
        self,
        tower: nn.Module,
        signals: frozenset[Signal],
        observation: Observation,
        feature_layer: int,
    ) -> Iterator[Removable]:
        """Yield the handle of every hook as it is made.

        After each forward pass of `tower`, `observation.finish` has been called once with the
        visual tokens and every one of `signals`.

        Args:
            tower: the tower.
            signals: what to compute; attention as rows, never as matrices.
            observation: where to put it.
            feature_layer: Python-style index of the block whose output is the features.
        """


class ModelAdapter(ABC):
    """Adapter that puts stages to work in a kind of model, by hooks.

    Attributes:
        options: what it serves beyond the defaults, by name: ``"per"`` of budgets, ``"positions"``
            and ``"newline"`` of placements. What does not stand here is refused by `attach`, so
            that no option is accepted and ignored.
    """

    options: ClassVar[Mapping[str, tuple[object, ...]]] = MappingProxyType({})

    @abstractmethod
    def provides(self, model: nn.Module, placement: Placement) -> frozenset[type[Signal]]:
        """The kinds of signal that strategies can read at `placement` of `model`.

        Raises:
            UnsupportedError: `placement` is not offered, or `model` has an option that cannot be
                served; the message says what would work.
        """

    @abstractmethod
    def install(
        self, model: nn.Module, stages: tuple[Stage, ...], record: Record
    ) -> Iterator[Removable]:
        """Yield the handle of every hook as it is made.

        Args:
            model: the model.
            stages: what to do, each at a placement that `provides` has accepted.
            record: where to note what was done.
        """

    def watch(self, model: nn.Module, attended: Attended) -> Iterator[Removable]:
        """Yield the handle of every hook that reads what the language model attends to. Optional.

        Args:
            model: the model, which computes what it always does.
            attended: where to note it; attention as rows, never as matrices.

        Raises:
            UnsupportedError: this adapter does not offer it, or cannot for `model`.
        """
        raise UnsupportedError(
            f"{type(self).__name__} cannot tell what a {type(model).__name__} attends to: it does "
            "not implement ModelAdapter.watch"
        )
