"""Scorers: one file each, one frozen dataclass each."""

from .cls_attention import ClsAttentionScorer
from .fastv import FastVScorer
from .fopru import FoPruScorer
from .pool_attention import PoolAttentionScorer
from .random import RandomScorer
from .received_attention import ReceivedAttentionScorer
from .relevance import RelevanceScorer
from .similarity import SimilarityScorer
from .uniform import UniformScorer

__all__ = [
    "ClsAttentionScorer",
    "FastVScorer",
    "FoPruScorer",
    "PoolAttentionScorer",
    "RandomScorer",
    "ReceivedAttentionScorer",
    "RelevanceScorer",
    "SimilarityScorer",
    "UniformScorer",
]
