"""Reducers: one file each, one frozen dataclass each."""

from .diverse import Diverse
from .dominant_contextual import DominantContextual
from .evict import Evict
from .important_diverse import ImportantDiverse
from .kmeans import KMeans
from .pool import Pool
from .prumerge import PruMerge, PruMergePlus
from .tome import ToMe

__all__ = [
    "Diverse",
    "DominantContextual",
    "Evict",
    "ImportantDiverse",
    "KMeans",
    "Pool",
    "PruMerge",
    "PruMergePlus",
    "ToMe",
]
