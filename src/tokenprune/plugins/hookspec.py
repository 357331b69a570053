"""Hooks of plugins (pluggy). Each takes nothing and yields records; implement what you need."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from .types import ModelPlugin, RecipePlugin, ReducerPlugin, ScorerPlugin, TowerPlugin

PROJECT = "tokenprune"
"""Name of the project for pluggy, and of the entry-point group."""

INTERFACE = 1
"""Version of the interface that plugins are written for: hooks, records, `Scorer`, `Reducer`,
`TowerAdapter`, `ModelAdapter` and what these are handed. A plugin says `tokenprune_interface = 1`
beside its hooks; one that says nothing was written for version 1. The version rises when a plugin
that keeps to the documented names would no longer work."""

OLDEST_INTERFACE = 1
"""Oldest version that still loads."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks an implementation: ``@tokenprune.hookimpl``."""


class TokenpruneSpecs:
    """Specifications of the hooks that a plugin may implement."""

    @hookspec
    def tokenprune_scorers(self) -> Iterable[ScorerPlugin]:
        """Scorers, each a frozen dataclass."""
        raise NotImplementedError

    @hookspec
    def tokenprune_reducers(self) -> Iterable[ReducerPlugin]:
        """Reducers, each a frozen dataclass."""
        raise NotImplementedError

    @hookspec
    def tokenprune_towers(self) -> Iterable[TowerPlugin]:
        """Adapters for vision towers."""
        raise NotImplementedError

    @hookspec
    def tokenprune_models(self) -> Iterable[ModelPlugin]:
        """Adapters for whole models."""
        raise NotImplementedError

    @hookspec
    def tokenprune_recipes(self) -> Iterable[RecipePlugin]:
        """Named specs."""
        raise NotImplementedError


HOOKS: dict[str, type] = {
    "scorers": ScorerPlugin,
    "reducers": ReducerPlugin,
    "towers": TowerPlugin,
    "models": ModelPlugin,
    "recipes": RecipePlugin,
}
"""Kind of record by the end of the hook's name."""
