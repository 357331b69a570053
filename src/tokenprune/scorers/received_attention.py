"""Attention that patches receive from each other: for towers without [CLS]."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..signals import Layers, ReceivedAttention, Signal, Signals, check_layers
from ..strategy import Scorer
from ..tokens import VisualTokens
from .ensemble import Ensemble, check_ensemble, ensembled


@dataclass(frozen=True)
class ReceivedAttentionScorer(Scorer):
    """Mean attention that each visual token receives from the others, ensembled over layers.

    The usual substitute for [CLS] attention in a tower that has no [CLS] (SigLIP). It is another
    method than `cls-attention`, so it has another name.

    Args:
        layers: K, that many vision layers, ending at the one which produces the features; or a
            tuple of layer indices.
        ensemble: ``"avg"``, ``"max"`` or ``"min"`` over the layers, after the head mean.
    """

    layers: Layers = 3
    ensemble: Ensemble = "avg"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_layers(self.layers))
        check_ensemble(self.ensemble)

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset({ReceivedAttention(self.layers)})

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        return ensembled(signals[ReceivedAttention(self.layers)], self.ensemble)
