"""Placements: where in a model the visual tokens are reduced."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from .budget import Budgeted
from .errors import BudgetError, SpecError

Positions: TypeAlias = Literal["reindexed", "original"]
"""Position ids of what is kept: counted anew (VTC-CLS, FasterVLM) or as they were (FastV)."""


Newline: TypeAlias = Literal["keep", "drop"]
"""What becomes of the newline tokens between the rows of an any-resolution image."""


def _check_positions(positions: str) -> None:
    if positions not in get_args(Positions):
        raise SpecError(f"positions must be 'reindexed' or 'original', got {positions!r}")


@dataclass(frozen=True)
class Placement(ABC):
    """Placement: where in a model a strategy acts. Its fields are its arguments in a spec."""

    @abstractmethod
    def check(self, steps: Sequence[object]) -> None:
        """Refuse steps that make no sense here, with a BudgetError or SpecError."""


@dataclass(frozen=True)
class BeforeLLM(Placement):
    """Between the vision tower and the projector: the LLM never sees what is dropped.

    Args:
        positions: position ids in the LLM. By default those of the model's family:
            ``"reindexed"`` (VTC-CLS, FasterVLM), but ``"original"`` where positions have a time, a
            row and a column (M-RoPE), which cannot be counted anew.
        newline: what becomes of the newline tokens of any-resolution images (LLaVA-NeXT):
            ``"keep"``, never counted in a budget, or ``"drop"`` (FasterVLM's released code).
    """

    positions: Positions | None = None
    newline: Newline = "keep"

    def __post_init__(self) -> None:
        if self.positions is not None:
            _check_positions(self.positions)
        if self.newline not in get_args(Newline):
            raise SpecError(f"newline must be 'keep' or 'drop', got {self.newline!r}")

    def check(self, steps: Sequence[object]) -> None:
        """Refuse a budget of zero: a model that asks about a picture must see some of it."""
        for step in steps:
            if isinstance(step, Budgeted) and step.keep == 0:
                raise BudgetError(
                    "keep=0 leaves no visual token before the LLM; keep at least 1, or withdraw "
                    "them all after a layer (Visual Token Withdrawal): 'evict(0) @ after-layer(15)'"
                )


@dataclass(frozen=True)
class AfterLayer(Placement):
    """After some layers of the LLM (or of a vision tower) have seen every token.

    Args:
        layers: layers that see every visual token; 2 is FastV's and VTC-CLS's choice.
        positions: position ids from there on, ``"original"`` by default (FastV).
    """

    layers: int = 2
    positions: Positions = "original"

    def __post_init__(self) -> None:
        _check_positions(self.positions)
        if isinstance(self.layers, bool) or not isinstance(self.layers, int) or self.layers < 1:
            raise SpecError(f"layers must be an int >= 1, got {self.layers!r}")

    def check(self, steps: Sequence[object]) -> None:
        """Any steps may stand here; evict(0) is Visual Token Withdrawal."""
