"""A tiny random LLaVA-1.5 whose text varies, and batches that show what batch 1 hides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

import tokenprune

IMAGE, PAD, BOS, EOS = 99, 0, 1, 2
PATCHES = 16


def tiny_llava(
    attention: str = "sdpa",
    seed: int = 4,
    tower: str = "clip",
    feature_layer: int | list[int] = -2,
    select: str = "default",
    layers: tuple[int, int] = (5, 3),
) -> LlavaForConditionalGeneration:
    """Random weights, scaled so that attention is peaked and logits are about 10.

    With the default initialisation text hardly varies, and parity tests have no teeth. `layers` are
    those of the tower and of the language model.
    """
    vision_config = {
        "clip": CLIPVisionConfig,
        "siglip": SiglipVisionConfig,
    }[tower](
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers[0],
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    text_config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers[1],
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
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # biases and [CLS] keep what the constructor gives them
        model = LlavaForConditionalGeneration(config).eval()
    scale(model, torch.Generator().manual_seed(seed))
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    return model


@torch.no_grad()
def scale(model: nn.Module, generator: torch.Generator) -> None:
    """Peaked attention, calm residuals: mistakes show at 1e-1, rounding stays below 1e-5."""
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim < 2:
            # Norms around 1, biases around 0; only the [CLS] token is neither.
            scale = 1.0 if "class_embedding" in name else 0.1
            weight.copy_(noise * scale + float("norm" in name and name.endswith("weight")))
            continue
        gain = 1.5 if "q_proj" in name or "k_proj" in name else 0.8
        gain = 0.5 if "mlp" in name else gain
        gain = 1.0 if "multi_modal_projector" in name else gain
        gain = 2.5 if "lm_head" in name else gain
        fan_in = weight[0].numel()
        if "embed_tokens" in name or "position_embedding" in name:
            fan_in = 1
        weight.copy_(noise * gain / fan_in**0.5)


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


def prompts() -> list[Row]:
    """One image; two images; text only: ragged, so that padding and fillers are everywhere."""
    return [
        Row([BOS, 11, 12, picture(1), 13, 14, 15]),
        Row([BOS, 21, picture(2), 22, 23, 24, picture(3), 25, 26, 27, 28]),
        Row([BOS, 31, 32, 33, 34]),
    ]


def collate(
    batch: list[Row], side: str = "left", extra: int = 0, labels: bool = False
) -> dict[str, Tensor]:
    """What a processor makes of the prompts; `extra` more columns of padding.

    With `labels`, those of all text but BOS, which is predicted from padding.
    """
    width = max(len(row.ids) for row in batch) + extra
    ids, mask = [], []
    for row in batch:
        pad = width - len(row.ids)
        left, right = (pad, 0) if side == "left" else (0, pad)
        ids.append([PAD] * left + row.ids + [PAD] * right)
        mask.append([0] * left + [1] * len(row.ids) + [0] * right)
    made = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    if labels:
        text = (made["attention_mask"] == 1) & (made["input_ids"] != IMAGE)
        made["labels"] = made["input_ids"].masked_fill(~text | (made["input_ids"] == BOS), -100)
    images = [image for row in batch for image in row.images]
    if images:
        made["pixel_values"] = torch.stack(images)
    return made


@dataclass(frozen=True)
class Answer:
    """What `generate` gave, without the prompts.

    Attributes:
        prompt: `(rows, tokens)` the part of the sequences that was the prompt.
        text: `(rows, steps)` new tokens.
        logits: `(rows, steps, vocabulary)` raw.
        cache: what may be continued.
    """

    prompt: Tensor
    text: Tensor
    logits: Tensor
    cache: Any


def generate(model: nn.Module, inputs: dict[str, Any], steps: int = 6, **options: Any) -> Answer:
    """`model.generate`, greedy unless `options` say otherwise, for exactly `steps` tokens."""
    options = {"do_sample": False, "eos_token_id": None, **options}
    width = inputs["input_ids"].shape[1]
    out = model.generate(
        **inputs,
        max_new_tokens=steps,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    logits = torch.stack(out.logits, dim=1)
    return Answer(out.sequences[:, :width], out.sequences[:, width:], logits, out.past_key_values)


def pruned(
    model: nn.Module,
    inputs: dict[str, Any],
    keep: int | float,
    positions: str = "reindexed",
    **options: Any,
) -> Answer:
    """`generate` of the attached model."""
    with tokenprune.attach(model, spec(keep, positions)):
        return generate(model, inputs, **options)


def spec(keep: int | float, positions: str = "reindexed") -> str:
    return f"cls-attention | evict({keep}) @ before-llm(positions={positions!r})"
