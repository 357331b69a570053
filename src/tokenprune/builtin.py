"""Built-in plugins: what the core offers, through the same hooks as any third party."""

from __future__ import annotations

from collections.abc import Iterable

from .plugins.hookspec import hookimpl
from .plugins.types import RecipePlugin, ReducerPlugin, ScorerPlugin
from .recipes import RECIPES
from .recipes_inside import RECIPES_INSIDE
from .reducers import (
    Diverse,
    DominantContextual,
    Evict,
    ImportantDiverse,
    KMeans,
    Pool,
    PruMerge,
    PruMergePlus,
    ToMe,
)
from .scorers import (
    ClsAttentionScorer,
    FastVScorer,
    FoPruScorer,
    PoolAttentionScorer,
    RandomScorer,
    ReceivedAttentionScorer,
    RelevanceScorer,
    SimilarityScorer,
    UniformScorer,
)


@hookimpl
def tokenprune_scorers() -> Iterable[ScorerPlugin]:
    """Built-in scorers."""
    yield ScorerPlugin(
        "cls-attention",
        "attention of [CLS] to each visual token, ensembled over K vision layers",
        ClsAttentionScorer,
        "VTC-CLS (arXiv 2412.05819), FasterVLM (arXiv 2412.01818)",
    )
    yield ScorerPlugin(
        "fastv",
        "attention of the prompt's last token in the latest LLM layer; after a layer only",
        FastVScorer,
        "FastV (arXiv 2403.06764)",
    )
    yield ScorerPlugin(
        "received-attention",
        "mean attention that each patch receives; for towers without [CLS]",
        ReceivedAttentionScorer,
    )
    yield ScorerPlugin(
        "pool-attention",
        "attention of the attention-pooling head's probe, for towers that have one",
        PoolAttentionScorer,
    )
    yield ScorerPlugin(
        "similarity",
        "pivots of largest norm, then tokens unlike them: duplicates go",
        SimilarityScorer,
        "after DART (arXiv 2502.11494)",
    )
    yield ScorerPlugin(
        "relevance",
        "cosine of each visual token with the text, where an adapter gives a space of both: "
        "ours do not",
        RelevanceScorer,
        "CDPruner (arXiv 2506.10967)",
    )
    yield ScorerPlugin(
        "fopru",
        "attention received or given, whichever varies more; by token or by row of the grid",
        FoPruScorer,
        "FoPru (arXiv 2411.14164)",
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
    yield ReducerPlugin(
        "tome",
        "merge the most similar pairs, in halving rounds, to any budget",
        ToMe,
        "ToMe (arXiv 2210.09461)",
    )
    yield ReducerPlugin(
        "kmeans",
        "merge the tokens of each cluster: seeded k-means++, then Lloyd's iterations",
        KMeans,
        "baseline of VTC-CLS (arXiv 2412.05819)",
    )
    yield ReducerPlugin(
        "prumerge",
        "keep tokens with outlying [CLS] attention, merge the others into them",
        PruMerge,
        "LLaVA-PruMerge (arXiv 2403.15388)",
    )
    yield ReducerPlugin(
        "prumerge-plus",
        "prumerge, with tokens sampled evenly over the picture kept as well",
        PruMergePlus,
        "LLaVA-PruMerge (arXiv 2403.15388)",
    )
    yield ReducerPlugin(
        "diverse",
        "keep the tokens that are farthest from each other (max-min distance)",
        Diverse,
        "DivPrune (arXiv 2503.02175)",
    )
    yield ReducerPlugin(
        "important-diverse",
        "keep the highest scores, and the least similar ones of the rest",
        ImportantDiverse,
        "VisPruner (arXiv 2412.01818)",
    )
    yield ReducerPlugin(
        "dominant-contextual",
        "keep the highest scores, merge the rest into a few contextual tokens",
        DominantContextual,
        "VisionZip (arXiv 2412.04467)",
    )
    yield ReducerPlugin("pool", "average neighbouring patches: the merging floor", Pool)


@hookimpl
def tokenprune_recipes() -> Iterable[RecipePlugin]:
    """Built-in recipes."""
    yield from RECIPES
    yield from RECIPES_INSIDE
