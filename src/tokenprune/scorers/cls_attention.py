"""[CLS] attention, alone or ensembled over layers: VTC-CLS and FasterVLM."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..signals import ClsAttention, Layers, Signal, Signals, check_layers
from ..strategy import Scorer
from ..tokens import VisualTokens
from .ensemble import Ensemble, check_ensemble, ensembled


@dataclass(frozen=True)
class ClsAttentionScorer(Scorer):
    """Attention of [CLS] to each visual token, head mean, ensembled over layers.

    VTC-CLS (arXiv 2412.05819), eq. 2 and 9. With `layers=1` it is FasterVLM's score
    (arXiv 2412.01818). Computed in float32 whatever the model's dtype; the row is not
    renormalised after the [CLS] column is left out, as in the released code.

    Args:
        layers: K, the paper's: that many vision layers, ending at the one which produces the
            features; or a tuple of layer indices.
        ensemble: ``"avg"``, ``"max"`` or ``"min"`` over the layers, after the head mean.
    """

    layers: Layers = 3
    ensemble: Ensemble = "avg"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_layers(self.layers))
        check_ensemble(self.ensemble)

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset({ClsAttention(self.layers)})

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        return ensembled(signals[ClsAttention(self.layers)], self.ensemble)
