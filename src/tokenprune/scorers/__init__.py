"""Scorers: one file each, one frozen dataclass each."""

from .cls_attention import ClsAttentionScorer
from .random import RandomScorer
from .uniform import UniformScorer

__all__ = ["ClsAttentionScorer", "RandomScorer", "UniformScorer"]
