"""Manifests of the models that lmms-eval is offered: its own, with a spec as an argument."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

_HERE = __name__.rpartition(".")[0]


def manifests() -> list[ModelManifest]:
    """Names and classes, none of which is imported before it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            "llava_hf_tokenprune",
            simple_class_path=f"{_HERE}.llava_hf.LlavaHfTokenprune",
            chat_class_path=f"{_HERE}.llava_hf.LlavaHfTokenpruneChat",
        ),
        ModelManifest(
            "huggingface_tokenprune",
            chat_class_path=f"{_HERE}.huggingface.HuggingfaceTokenprune",
        ),
        ModelManifest(
            "video_llava_tokenprune",
            simple_class_path=f"{_HERE}.video_llava.VideoLlavaTokenprune",
        ),
    ]
