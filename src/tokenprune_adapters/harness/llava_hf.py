"""lmms-eval's `llava_hf` (LLaVA-1.5 and LLaVA-NeXT of transformers), compressed."""

from __future__ import annotations

from lmms_eval.models.chat.llava_hf import LlavaHf as Chat
from lmms_eval.models.simple.llava_hf import LlavaHf as Simple

from .pruned import Pruned


class LlavaHfTokenprune(Pruned, Simple):  # type: ignore[misc]
    """``lmms-eval --model llava_hf_tokenprune --force_simple``: prompts as strings."""


class LlavaHfTokenpruneChat(Pruned, Chat):  # type: ignore[misc]
    """``lmms-eval --model llava_hf_tokenprune``: prompts by the processor's chat template."""
