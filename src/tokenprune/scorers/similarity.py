"""Duplication: tokens unlike a few pivots, as in DART."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..fields import check_whole
from ..metric import cosine, moderate, wide
from ..signals import Signals
from ..strategy import Scorer
from ..tokens import VisualTokens

_PIVOT = 3.0
"""Above every other score, which are in [0, 2]."""


@dataclass(frozen=True)
class SimilarityScorer(Scorer):
    """Pivots first, then tokens that duplicate no pivot: 1 - the largest cosine to one.

    After DART (arXiv 2502.11494), stated as scores: pivots are the tokens of largest norm, and
    what resembles them least is kept with them. DART itself takes its pivots in the language
    model, from image and text, and picks for each pivot in turn. Tokens that tie with the last
    pivot are pivots as well.

    Args:
        pivots: how many pivots.
    """

    pivots: int = 4

    def __post_init__(self) -> None:
        check_whole("pivots", self.pivots, 1)

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        x = moderate(torch.where(tokens.mask[:, :, None], tokens.features, 0))
        norm = torch.linalg.vector_norm(wide(x), dim=2).float()
        norm = norm.masked_fill(~tokens.mask, -1)
        largest = norm.topk(min(self.pivots, norm.shape[1]), dim=1).values
        # Rows with fewer tokens than pivots count padding among the largest; it is no pivot.
        pivot = (norm >= largest[:, -1:]) & tokens.mask
        similar = cosine(x, x).masked_fill(~pivot[:, None, :], -torch.inf).amax(2)
        scores = torch.where(pivot, _PIVOT, 1 - similar)
        return scores.masked_fill(~tokens.mask, -torch.inf)
