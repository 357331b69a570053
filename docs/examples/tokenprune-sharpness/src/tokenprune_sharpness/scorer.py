"""The scorer."""

# --8<-- [start:scorer]
from dataclasses import dataclass

from torch import Tensor

from tokenprune import Scorer, Signals, VisualTokens


@dataclass(frozen=True)
class SharpnessScorer(Scorer):
    """How far the features of a token are from the mean of its picture."""

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        padding = ~tokens.mask[:, :, None]
        features = tokens.features.float().masked_fill(padding, 0)
        mean = features.sum(1, keepdim=True) / tokens.mask.sum(1)[:, None, None]
        return (features - mean).norm(dim=-1)
        # --8<-- [end:scorer]
