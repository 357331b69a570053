"""Tiny random checkpoints with processors, for programs that load models by their path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaProcessor,
)

from tokenprune_adapters import pocket

from .llava import scale

SIDE, PATCH = 32, 8
PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def configs(tokenizer: Any) -> dict[str, Any]:
    """Of a vision tower and of a language model that reads the words of `tokenizer`."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=1024,
    )
    return {"vision_config": vision, "text_config": text, "vision_feature_layer": -2}


def llava_next(place: Path) -> Path:
    """A LLaVA-NeXT of the pocket model's words."""
    from transformers import LlavaNextImageProcessor

    like: Any = pocket.load()[1]
    image = like.tokenizer.convert_tokens_to_ids("<image>")
    model = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            **configs(like.tokenizer), image_token_id=image, image_grid_pinpoints=PINPOINTS
        )
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_grid_pinpoints=PINPOINTS,
        ),
        tokenizer=like.tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=like.chat_template,
    )
    return _saved(model, processor, place)


def video_llava(place: Path) -> Path:
    """A Video-LLaVA of the pocket model's words."""
    from transformers import VideoLlavaImageProcessor, VideoLlavaVideoProcessor

    tokenizer: Any = pocket.load()[1].tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    model = VideoLlavaForConditionalGeneration(
        VideoLlavaConfig(
            **configs(tokenizer),
            image_token_index=image,
            video_token_index=video,
            vision_feature_select_strategy="default",
        )
    )
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    processor = VideoLlavaProcessor(
        image_processor=VideoLlavaImageProcessor(**sizes),
        video_processor=VideoLlavaVideoProcessor(**sizes),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return _saved(model, processor, place)


def _saved(model: Any, processor: Any, place: Path) -> Path:
    with torch.no_grad():
        scale(model, torch.Generator().manual_seed(0))
    model.save_pretrained(place)
    processor.save_pretrained(place)
    return place
