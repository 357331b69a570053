"""Quilt for tokenprune: a scorer, a reducer, a recipe, a tower and a model."""

from collections.abc import Iterable

import tokenprune
from tokenprune import (
    ModelAdapter,
    ModelPlugin,
    RecipePlugin,
    ReducerPlugin,
    ScorerPlugin,
    TowerAdapter,
    TowerPlugin,
)

from .steps import FoldReducer, OutlierScorer

__all__ = ["FoldReducer", "OutlierScorer"]

# --8<-- [start:plugin]
tokenprune_interface = 1


@tokenprune.hookimpl
def tokenprune_scorers() -> Iterable[ScorerPlugin]:
    """The scorer of this package."""
    yield ScorerPlugin("outlier", "distance of a token's keys from their mean", OutlierScorer)


@tokenprune.hookimpl
def tokenprune_reducers() -> Iterable[ReducerPlugin]:
    """The reducer of this package."""
    yield ReducerPlugin("fold", "merge what goes into the kept token before it", FoldReducer)


@tokenprune.hookimpl
def tokenprune_recipes() -> Iterable[RecipePlugin]:
    """Both together."""
    yield RecipePlugin(
        "quilt",
        "outlying keys stay, the rest is folded into them",
        template="outlier(layer={layer}) | fold({keep}) @ before-llm",
        defaults={"keep": 0.25, "layer": -2},
    )


@tokenprune.hookimpl
def tokenprune_towers() -> Iterable[TowerPlugin]:
    """`ViTModel`, which tokenprune does not ship."""
    claims = ("transformers.models.vit.modeling_vit.ViTModel",)
    yield TowerPlugin("vit", "ViTModel of transformers", _tower, claims)


@tokenprune.hookimpl
def tokenprune_models() -> Iterable[ModelPlugin]:
    """Quilt."""
    yield ModelPlugin("quilt", "Quilt, before the LLM", _model, ("tokenprune_quilt.model.Quilt",))


def _tower() -> TowerAdapter:
    from .adapter import VitTowerAdapter

    return VitTowerAdapter()


def _model() -> ModelAdapter:
    from .adapter import QuiltAdapter

    return QuiltAdapter()
    # --8<-- [end:plugin]
