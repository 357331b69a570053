"""Attention maps of parts of transformers models, by eager attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..anatomy import patches_per_crop


@contextmanager
def eager(part: Any) -> Iterator[None]:
    """Eager attention in a tower or language model, which gives maps; then what it had before."""
    before = part.config._attn_implementation
    part.set_attn_implementation("eager")
    try:
        yield
    finally:
        part.set_attn_implementation(before)


def see(tower: Any, pixels: Tensor, config: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What a vision tower makes of pictures.

    Args:
        tower: vanilla tower.
        pixels: `(pictures, 3, side, side)`.
        config: config of the model, which says which hidden states are the features.

    Returns:
        `(pictures, prefix, channels)` features of [CLS], `(pictures, patches, channels)` features,
        `(pictures, patches)` scores: attention of [CLS], or what is received where there is none,
        over three layers that end at the features.
    """
    with eager(tower):
        seen = tower(pixels, output_hidden_states=True, output_attentions=True)
    numbers = config.vision_feature_layer
    numbers = list(numbers) if isinstance(numbers, (list, tuple)) else [numbers]
    features = torch.cat([seen.hidden_states[number] for number in numbers], dim=-1)
    # Hidden state number n comes out of block n - 1.
    end = numbers[-1] % len(seen.hidden_states)
    maps = torch.stack(seen.attentions[max(end - 3, 0) : end]).float().mean(dim=(0, 2))
    prefix = features.shape[1] - patches_per_crop(config)
    scores = maps[:, 0, prefix:] if prefix else maps.mean(1)
    return features[:, :prefix], features[:, prefix:], scores


def scorer(config: Any, has_cls: bool) -> str:
    """Spec of the scorer that `see` scores by."""
    number = config.vision_feature_layer
    number = number[-1] if isinstance(number, (list, tuple)) else number
    blocks = config.vision_config.num_hidden_layers
    layers = min(3, number % (blocks + 1))
    return f"{'cls' if has_cls else 'received'}-attention(layers={layers})"
