"""Plugins: scorers, reducers, towers, models and recipes, built in or from other packages."""

from .hookspec import hookimpl
from .manager import Registry, registry
from .types import ModelPlugin, RecipePlugin, ReducerPlugin, ScorerPlugin, TowerPlugin

__all__ = [
    "ModelPlugin",
    "RecipePlugin",
    "ReducerPlugin",
    "Registry",
    "ScorerPlugin",
    "TowerPlugin",
    "hookimpl",
    "registry",
]
