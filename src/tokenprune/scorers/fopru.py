"""Focal pruning: the margin of the attention matrix that varies more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..fields import check_choice, check_read, check_whole
from ..metric import wide
from ..signals import GivenAttention, Layers, ReceivedAttention, Signal, Signals, check_layers
from ..strategy import Scorer
from ..to_device import numbers_on
from ..tokens import VisualTokens
from .ensemble import ensembled

Mode: TypeAlias = Literal["rank", "row"]


@dataclass(frozen=True)
class FoPruScorer(Scorer):
    """Attention received, or given, by each visual token: whichever varies more.

    FoPru (arXiv 2411.14164). The head mean of a layer's attention is averaged over its rows
    and over its columns, and the average with the larger variance over the picture's tokens is
    their significance. ``"rank"`` scores each token by its own, ``"row"`` by the mean over its row
    of the patch grid, so that eviction keeps whole rows.

    Args:
        mode: ``"rank"`` or ``"row"``.
        layers: K, that many vision layers ending at the one which produces the features (their
            mean; 1 in the paper); or a tuple of layer indices.
        columns: patches in a row of the grid; None for a square grid.
    """

    mode: Mode = "rank"
    layers: Layers = 1
    columns: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_layers(self.layers))
        check_choice("mode", self.mode, get_args(Mode))
        check_whole("columns", self.columns, 1, or_none=True)
        if self.mode == "rank":
            check_read("columns", self.columns, None, "mode='rank' has no rows", "mode='row'")

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset({ReceivedAttention(self.layers), GivenAttention(self.layers)})

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        received = ensembled(signals[ReceivedAttention(self.layers)], "avg")
        given = ensembled(signals[GivenAttention(self.layers)], "avg")
        # A hair's breadth in favour of `received`, so that equal ones are not decided by rounding.
        less = _variance(received, tokens.mask) * (1 + 1e-9) < _variance(given, tokens.mask)
        significance = torch.where(less, given, received)
        if self.mode == "row":
            significance = self._row_means(significance, tokens)
        return significance.masked_fill(~tokens.mask, -torch.inf)

    def _row_means(self, significance: Tensor, tokens: VisualTokens) -> Tensor:
        columns = [self.columns or math.isqrt(max(n - 1, 0)) + 1 for n in tokens.lengths]
        width = numbers_on(significance.device, columns)[:, None]
        row = tokens.patches.div(width, rounding_mode="floor")
        same = (row[:, :, None] == row[:, None, :]) & tokens.mask[:, None, :]
        total = torch.where(same, wide(significance)[:, None, :], 0).sum(2)
        mean: Tensor = (total / same.sum(2).clamp(min=1)).float()
        return mean


def _variance(x: Tensor, mask: Tensor) -> Tensor:
    """`(batch, 1)` float64: the variance of each row over its real tokens; 0 if it is rounding."""
    count = mask.sum(1, keepdim=True).clamp(min=1)
    x = torch.where(mask, wide(x), 0)
    deviation = torch.where(mask, x - x.sum(1, keepdim=True) / count, 0)
    variance = deviation.square().sum(1, keepdim=True) / count
    rounding = 1e-20 * x.square().sum(1, keepdim=True) / count
    return torch.where(variance > rounding, variance, 0)
