"""lmms-eval's `llava_hf` (LLaVA-1.5 and LLaVA-NeXT of transformers), compressed."""

from __future__ import annotations

import os

from lmms_eval.models.chat.llava_hf import LlavaHf as Chat
from lmms_eval.models.simple.llava_hf import LlavaHf as Simple

from .mixin import Pruned


class _OfTransformers(Pruned):
    @staticmethod
    def _device_map(device: str) -> str:
        """Its own default, "", means one GPU for each of several processes, and fails for one."""
        return "" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else device


class LlavaHfTokenprune(_OfTransformers, Simple):  # type: ignore[misc]
    """``lmms-eval --model llava_hf_tokenprune --force_simple``: prompts as strings."""


class LlavaHfTokenpruneChat(_OfTransformers, Chat):  # type: ignore[misc]
    """``lmms-eval --model llava_hf_tokenprune``: prompts by the processor's chat template."""
