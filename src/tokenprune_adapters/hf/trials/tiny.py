"""Tiny parts of transformers models."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...kit.peaked_weights import peaked

IMAGE, VIDEO = 99, 98
"""Placeholders, the last ids of the vocabulary."""


def vision_config(kind: str = "CLIPVision") -> Any:
    """Vision tower of four layers and 16 patches, of the config class that starts with `kind`."""
    import transformers

    return getattr(transformers, f"{kind}Config")(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )


def text_config() -> Any:
    """Llama of four layers, whose heads share keys two by two."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=512,
    )


def tiny(model: Any) -> nn.Module:
    """`model` with peaked weights, ready to generate."""
    model.generation_config.pad_token_id = 0
    return peaked(model)
