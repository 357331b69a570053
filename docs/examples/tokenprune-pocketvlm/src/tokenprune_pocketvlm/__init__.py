"""PocketVLM, and the plugin that compresses its visual tokens."""

from collections.abc import Iterable

import tokenprune
from tokenprune import ModelPlugin, TowerPlugin

from .adapter import PocketAdapter, VisionAdapter
from .model import IMAGE, Config, PocketVLM, Vision
from .trials import trials

__all__ = ["IMAGE", "Config", "PocketAdapter", "PocketVLM", "Vision", "VisionAdapter"]


# --8<-- [start:plugin]
@tokenprune.hookimpl
def tokenprune_towers() -> Iterable[TowerPlugin]:
    """The vision tower of PocketVLM."""
    claims = ("tokenprune_pocketvlm.model.Vision",)
    yield TowerPlugin("pocketvlm", "the tower of PocketVLM", VisionAdapter, claims)


@tokenprune.hookimpl
def tokenprune_models() -> Iterable[ModelPlugin]:
    """PocketVLM."""
    claims = ("tokenprune_pocketvlm.model.PocketVLM",)
    yield ModelPlugin("pocketvlm", "PocketVLM, before the LLM", PocketAdapter, claims, trials)
    # --8<-- [end:plugin]
