"""Serving with vLLM: LLaVA-1.5 whose language model gets the kept tokens alone.

vLLM finds `register` through the entry-point group `vllm.general_plugins`, in every process that it
starts. What decides which tokens stay is `tokenprune` itself: this package asks vLLM's vision tower
for signals, and tells vLLM in advance how many tokens a picture will have.
"""

from __future__ import annotations

from .settings import ARCHITECTURE, KEY, Served

__all__ = ["ARCHITECTURE", "KEY", "Served", "register"]


def register() -> None:
    """Tell vLLM of the architecture. May be called again; imports no model."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.llava:{ARCHITECTURE}")
