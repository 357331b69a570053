"""Sharpness: what stands out from the rest of the picture stays."""

from collections.abc import Iterable

import tokenprune
from tokenprune import ScorerPlugin

from .scorer import SharpnessScorer

__all__ = ["SharpnessScorer"]


# --8<-- [start:plugin]
@tokenprune.hookimpl
def tokenprune_scorers() -> Iterable[ScorerPlugin]:
    """The scorer of this package."""
    yield ScorerPlugin("sharpness", "distance from the mean of the picture", SharpnessScorer)
    # --8<-- [end:plugin]
