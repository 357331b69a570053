"""LLaVA-1.5: every picture has the same number of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from tokenprune.trial import Questions, Trial

from ..anatomy import patches_per_crop
from ..families import LLAVA, LLAVA_PIXTRAL
from .chat import questions
from .families import pixtral_trial
from .prompts import Part, Pictures
from .tiny import IMAGE, text_config, tiny, vision_config


class LlavaPictures(Pictures):
    """Three pictures for LLaVA."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.pixels = self.noise(3, seed=1)

    def parts(self) -> Sequence[Part]:
        _, patches, scores = self.see(self.core.vision_tower, self.pixels)
        embeds = self.core.multi_modal_projector(patches)
        placeholder = self.config.image_token_id
        return [self.shown(placeholder, *each) for each in zip(embeds, scores, strict=True)]

    def arguments(self) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels}


def _build(kind: str) -> nn.Module:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=vision_config(kind),
        text_config=text_config(),
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full" if kind == "SiglipVision" else "default",
    )
    config.image_seq_length = patches_per_crop(config)
    return tiny(LlavaForConditionalGeneration(config))


def trials() -> Iterable[Trial]:
    """With each tower."""
    towers = {"CLIP": "CLIPVision", "SigLIP": "SiglipVision", "DINOv2": "Dinov2"}
    for tower, kind in towers.items():
        yield Trial(
            f"LlavaForConditionalGeneration ({tower})",
            "transformers",
            partial(_build, kind),
            _questions,
        )
    yield pixtral_trial()


def _questions(model: Any) -> Questions:
    """By the tower, which of a user's model may be any of these."""
    trial = pixtral_trial()
    packed = LLAVA.of(model) is LLAVA_PIXTRAL
    return (trial.questions if packed else questions(LlavaPictures))(model)
