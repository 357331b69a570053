"""Attention of the pooling head's probe: for towers that pool by attention."""

from __future__ import annotations

from dataclasses import dataclass

from einops import reduce
from torch import Tensor

from ..signals import PoolAttention, Signal, Signals
from ..strategy import Scorer
from ..tokens import VisualTokens


@dataclass(frozen=True)
class PoolAttentionScorer(Scorer):
    """Attention of the attention-pooling head's probe to each visual token, head mean.

    The probe of SigLIP and its like is trained to gather what describes the picture, as [CLS] is
    in CLIP. The head reads the last layer, whatever layer the features come from.
    """

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset({PoolAttention()})

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        rows = signals[PoolAttention()].float()
        return reduce(rows, "batch heads tokens -> batch tokens", "mean")
