"""Random scores: the control that every method must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SpecError
from ..signals import Signals
from ..strategy import Scorer
from ..tokens import VisualTokens


@dataclass(frozen=True)
class RandomScorer(Scorer):
    """Independent uniform scores in [0, 1), from a seed.

    A counter-based generator (SplitMix64; Steele, Lea and Flood, 2014) of seed, image
    (`VisualTokens.ids`) and position: the same picture gets the same scores alone, in a batch,
    padded, and on any device, the sets are nested in the budget, and no global state is touched.

    Args:
        seed: a non-negative int.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise SpecError(f"seed must be an int >= 0, got {self.seed!r}")

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        seed = torch.tensor(self.seed % 2**63, device=tokens.ids.device)
        row = _mix(_mix(seed) ^ tokens.ids)
        bits = _mix(row[:, None] ^ _mix(tokens.positions))
        scores: Tensor = (bits & 0xFFFFFF).to(torch.float32) / 2**24
        return scores


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's output function on int64 that wraps around."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift right: torch's own repeats the sign bit."""
    return torch.bitwise_and(x >> bits, 2 ** (64 - bits) - 1)
