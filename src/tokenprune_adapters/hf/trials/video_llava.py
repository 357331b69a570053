"""Video-LLaVA: pictures and videos, each through a tower of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.trial import Trial

from .chat import questions
from .prompts import Part, Pictures
from .tiny import IMAGE, VIDEO, text_config, tiny, vision_config

FRAMES = 3


class VideoLlavaPictures(Pictures):
    """A video, a picture, and another video."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.pictures = self.noise(1, seed=1)
        self.videos = self.noise(2, FRAMES, seed=2)

    def parts(self) -> Sequence[Part]:
        first, second = self._videos()
        return [first, self._picture(), second]

    def arguments(self) -> dict[str, Tensor]:
        return {"pixel_values_images": self.pictures, "pixel_values_videos": self.videos}

    def _picture(self) -> Part:
        _, patches, scores = self.see(self.core.image_tower, self.pictures)
        embeds = self.core.multi_modal_projector(patches)
        return self.shown(self.config.image_token_id, embeds[0], scores[0])

    def _videos(self) -> list[Part]:
        """Of every frame the model shows [CLS], which no budget counts, and then the patches."""
        frames = self.videos.flatten(0, 1)
        cls, patches, scores = self.see(self.core.video_tower, frames)
        embeds = self.core.multi_modal_projector(torch.cat([cls, patches], dim=1))
        scores = torch.cat([scores.new_full(cls.shape[:2], torch.inf), scores], dim=1)
        return [
            self.shown(self.config.video_token_id, each.flatten(0, 1), of_each.flatten())
            for each, of_each in zip(embeds.chunk(2), scores.chunk(2), strict=True)
        ]


def _build() -> nn.Module:
    from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration

    config = VideoLlavaConfig(
        vision_config=vision_config(),
        text_config=text_config(),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-2,
    )
    return tiny(VideoLlavaForConditionalGeneration(config))


def trials() -> Iterable[Trial]:
    """With CLIP towers."""
    yield Trial(
        "VideoLlavaForConditionalGeneration",
        "transformers",
        _build,
        questions(VideoLlavaPictures),
    )
