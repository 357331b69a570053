"""Relevance to the text, where a model puts pictures and text in one space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..metric import cosine, wide
from ..signals import AlignedFeatures, Signal, Signals, TextFeatures
from ..strategy import Scorer
from ..tokens import VisualTokens


@dataclass(frozen=True)
class RelevanceScorer(Scorer):
    """Cosine of each visual token with the text, mean over text features, scaled to [0, 1].

    The relevance of CDPruner (arXiv 2506.10967). Its released code for CLIP takes the negated
    cosine, for there the patches that show what the text names are often the least similar to it:
    say ``negate=True`` for that.

    Args:
        negate: rank by the negated cosine, as released.
    """

    negate: bool = False

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset({AlignedFeatures(), TextFeatures()})

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        aligned = torch.where(tokens.mask[:, :, None], signals[AlignedFeatures()], 0)
        texts = signals[TextFeatures()]
        given = (texts != 0).any(2)
        similar = wide(cosine(aligned, texts)).masked_fill(~given[:, None, :], 0)
        mean = similar.sum(2) / given.sum(1, keepdim=True).clamp(min=1)
        mean = -mean if self.negate else mean
        low = mean.masked_fill(~tokens.mask, torch.inf).amin(1, keepdim=True)
        high = mean.masked_fill(~tokens.mask, -torch.inf).amax(1, keepdim=True)
        span = torch.where(high > low, high - low, 1)
        scores: Tensor = ((mean - low) / span).float()
        return scores.masked_fill(~tokens.mask, -torch.inf)
