"""PocketVLM, and the plugin that compresses its visual tokens."""

from collections.abc import Iterable

import tokenprune
from tokenprune import ModelAdapter, ModelPlugin, TowerAdapter, TowerPlugin
from tokenprune.trial import Trial

from .model import IMAGE, Config, PocketVLM, Vision

__all__ = ["IMAGE", "Config", "PocketVLM", "Vision"]


# --8<-- [start:plugin]
def tower() -> TowerAdapter:
    """The adapter, imported when a tower is there: every use of tokenprune loads every plugin."""
    from .adapter import VisionAdapter

    return VisionAdapter()


def model() -> ModelAdapter:
    """The adapter of the whole model."""
    from .adapter import PocketAdapter

    return PocketAdapter()


def tiny_models() -> Iterable[Trial]:
    """What the doctor compares."""
    from .trials import trials

    return trials()


@tokenprune.hookimpl
def tokenprune_towers() -> Iterable[TowerPlugin]:
    """The vision tower of PocketVLM."""
    claims = ("tokenprune_pocketvlm.model.Vision",)
    yield TowerPlugin("pocketvlm", "the tower of PocketVLM", tower, claims)


@tokenprune.hookimpl
def tokenprune_models() -> Iterable[ModelPlugin]:
    """PocketVLM."""
    claims = ("tokenprune_pocketvlm.model.PocketVLM",)
    yield ModelPlugin("pocketvlm", "PocketVLM, before the LLM", model, claims, tiny_models)
    # --8<-- [end:plugin]
