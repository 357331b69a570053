"""What the core offers, through the same hooks as any third party."""

from __future__ import annotations

from collections.abc import Iterable

from ..recipes import RECIPES
from ..reducers import Evict
from ..scorers import ClsAttentionScorer, RandomScorer, UniformScorer
from .hookspec import hookimpl
from .types import RecipePlugin, ReducerPlugin, ScorerPlugin


@hookimpl
def tokenprune_scorers() -> Iterable[ScorerPlugin]:
    """Built-in scorers."""
    yield ScorerPlugin(
        "cls-attention",
        "attention of [CLS] to each visual token, ensembled over K vision layers",
        ClsAttentionScorer,
        "VTC-CLS (arXiv 2412.05819), FasterVLM (arXiv 2412.01818)",
    )
    yield ScorerPlugin("random", "seeded random scores per image: the control", RandomScorer)
    yield ScorerPlugin("uniform", "an even stride over the raster: the honest floor", UniformScorer)


@hookimpl
def tokenprune_reducers() -> Iterable[ReducerPlugin]:
    """Built-in reducers."""
    yield ReducerPlugin(
        "evict",
        "keep the tokens with the highest scores, drop the rest",
        Evict,
        "VTC-CLS (arXiv 2412.05819), FastV (arXiv 2403.06764)",
    )


@hookimpl
def tokenprune_recipes() -> Iterable[RecipePlugin]:
    """Built-in recipes."""
    yield from RECIPES
