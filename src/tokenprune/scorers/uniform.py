"""A uniform stride over the raster: the floor that costs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..signals import Signals
from ..strategy import Scorer
from ..to_device import sent
from ..tokens import VisualTokens


@dataclass(frozen=True)
class UniformScorer(Scorer):
    """Spreads what is kept evenly over the raster, whatever the picture shows.

    Tokens rank by the first time that the van der Corput sequence (base 2) visits them, so the
    kept sets are nested in the budget, and every budget 2^k of n tokens is the stride n / 2^k.
    Not equivariant to permutations: it looks at the place of a token, not at what it holds.
    """

    exempt: ClassVar[Mapping[str, str]] = {"S5": "it looks at the place of a token alone"}

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        rank = (tokens.mask.cumsum(1) - 1).clamp(min=0)
        rows = [_visits(max(length, 1)) for length in tokens.lengths]
        table = sent(pad_sequence(rows, batch_first=True), tokens.features.device)
        scores = table.gather(1, rank)
        return scores.masked_fill(~tokens.mask, -torch.inf)


@lru_cache(maxsize=64)
def _visits(tokens: int) -> Tensor:
    """`(tokens,)` float32: minus the step at which the sequence first visits each token."""
    steps = torch.arange(2 ** max(tokens - 1, 1).bit_length(), dtype=torch.float64)
    # Radical inverse in base 2: the bits of the step, mirrored at the binary point.
    inverse = torch.zeros_like(steps)
    rest, scale = steps.clone(), 0.5
    while bool((rest > 0).any()):
        inverse += (rest % 2) * scale
        rest, scale = rest.div(2, rounding_mode="floor"), scale / 2
    place = (inverse * tokens).long()
    first = torch.full((tokens,), steps.numel(), dtype=torch.int64)
    first.scatter_reduce_(0, place, torch.arange(steps.numel()), reduce="amin")
    return -first.float()
