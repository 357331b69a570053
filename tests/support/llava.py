"""A tiny random LLaVA-1.5 whose text varies, and batches that show what batch 1 hides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

IMAGE, PAD, BOS, EOS = 99, 0, 1, 2
PATCHES = 16


def tiny_llava(
    attention: str = "sdpa",
    seed: int = 0,
    tower: str = "clip",
    feature_layer: int | list[int] = -2,
    select: str = "default",
) -> LlavaForConditionalGeneration:
    """Random weights, scaled so that attention is peaked and logits are about 10.

    With the default initialisation text hardly varies, and parity tests have no teeth.
    """
    vision_config = {
        "clip": CLIPVisionConfig,
        "siglip": SiglipVisionConfig,
    }[tower](
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    text_config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        max_position_embeddings=512,
    )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=select,
        attn_implementation=attention,
    )
    generator = torch.Generator().manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                scale = 1.0 if "embed" in name else 1.6 / weight[0].numel() ** 0.5
                scale *= 1.5 if "q_proj" in name or "k_proj" in name else 1
                scale *= 2 if "lm_head" in name else 1
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    return model


@dataclass
class Row:
    """One prompt: token ids with an int for text and an image for its placeholders."""

    parts: list[int | Tensor]

    @property
    def images(self) -> list[Tensor]:
        return [part for part in self.parts if isinstance(part, Tensor)]

    @property
    def ids(self) -> list[int]:
        return [
            token
            for part in self.parts
            for token in ([IMAGE] * PATCHES if isinstance(part, Tensor) else [part])
        ]


def picture(seed: int) -> Tensor:
    return torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(seed))


def rows() -> list[Row]:
    """One image; two images; text only: ragged, so that padding and fillers are everywhere."""
    return [
        Row([BOS, 11, 12, picture(1), 13, 14, 15]),
        Row([BOS, 21, picture(2), 22, 23, 24, picture(3), 25, 26, 27, 28]),
        Row([BOS, 31, 32, 33, 34]),
    ]


def collate(batch: list[Row], side: str = "left", extra: int = 0) -> dict[str, Tensor]:
    """What a processor makes of the prompts; `extra` more columns of padding."""
    width = max(len(row.ids) for row in batch) + extra
    ids, mask = [], []
    for row in batch:
        pad = width - len(row.ids)
        left, right = (pad, 0) if side == "left" else (0, pad)
        ids.append([PAD] * left + row.ids + [PAD] * right)
        mask.append([0] * left + [1] * len(row.ids) + [0] * right)
    made = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    images = [image for row in batch for image in row.images]
    if images:
        made["pixel_values"] = torch.stack(images)
    return made
