"""LLaVA-NeXT: a base view and tiles of every picture, packed with newlines by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenprune.trial import Trial

from .chat import questions
from .prompts import Part, Pictures
from .tiny import IMAGE, text_config, tiny, vision_config


class LlavaNextPictures(Pictures):
    """Three wide pictures; the second leaves rows of its tiles empty."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        side = self.config.vision_config.image_size
        height, width = min(
            self.config.image_grid_pinpoints, key=lambda each: (each[0] >= each[1], sum(each))
        )
        self.tiles = height // side, width // side
        self.sizes = [(height, width), (height * 3 // 4, width), (height, width)]
        self.crops = self.noise(3, 1 + self.tiles[0] * self.tiles[1], seed=1)

    def parts(self) -> Sequence[Part]:
        _, patches, scores = self.see(self.core.vision_tower, self.crops.flatten(0, 1))
        features = self.core.multi_modal_projector(patches)
        both = torch.cat([features.float(), scores[:, :, None]], dim=-1)
        return [
            self.shown(self.config.image_token_id, *self._packed(crops, *size))
            for crops, size in zip(both.chunk(3), self.sizes, strict=True)
        ]

    def arguments(self) -> dict[str, Tensor]:
        sizes = torch.tensor(self.sizes, device=self.crops.device)
        return {"pixel_values": self.crops, "image_sizes": sizes}

    def _packed(self, crops: Tensor, tall: int, wide: int) -> tuple[Tensor, Tensor]:
        """Tokens of one picture.

        The base view comes first. Tiles form one large grid, of which the rows that padding fills
        are cut off, and every row ends with a newline, which no budget counts.

        Args:
            crops: `(crops, patches, channels + 1)` features, and scores as the last channel.
            tall: height of the picture.
            wide: its width.

        Returns:
            `(tokens, channels)` features and `(tokens,)` scores.
        """
        tokens = "(down across) (high wide) channels -> (down high) (across wide) channels"
        high = int(crops.shape[1] ** 0.5)
        grid = rearrange(crops[1:], tokens, down=self.tiles[0], high=high)
        padding = (grid.shape[0] - int(round(tall * grid.shape[1] / wide, 7))) // 2
        grid = grid[padding : grid.shape[0] - padding]
        newline = torch.cat([self.core.image_newline.float(), grid.new_tensor([torch.inf])])
        rows = torch.cat([grid, newline.expand(len(grid), 1, -1)], dim=1)
        packed = torch.cat([crops[0], rows.flatten(0, 1)])
        return packed[:, :-1].to(self.crops.dtype), packed[:, -1]


def _build() -> nn.Module:
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig(
        vision_config=vision_config(),
        text_config=text_config(),
        image_token_id=IMAGE,
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
        vision_feature_layer=-2,
    )
    return tiny(LlavaNextForConditionalGeneration(config))


def trials() -> Iterable[Trial]:
    """With a CLIP tower."""
    yield Trial(
        "LlavaNextForConditionalGeneration",
        "transformers",
        _build,
        questions(LlavaNextPictures),
    )
