"""Plugins: scorers, reducers, towers, models and recipes, built in or from other packages."""

from .discovery import registry
from .hookspec import INTERFACE, hookimpl
from .offers import CORE, Registry
from .types import ModelPlugin, RecipePlugin, ReducerPlugin, ScorerPlugin, TowerPlugin

__all__ = [
    "CORE",
    "INTERFACE",
    "ModelPlugin",
    "RecipePlugin",
    "ReducerPlugin",
    "Registry",
    "ScorerPlugin",
    "TowerPlugin",
    "hookimpl",
    "registry",
]
