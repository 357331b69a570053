"""Attention ROWS recomputed from queries and keys, so that the model's own kernel stays on."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def attention_row(query: Tensor, keys: Tensor, heads: int, scale: float) -> Tensor:
    """The attention of one query to all keys, softmax in float32.

    Args:
        query: `(batch, 1, heads * channels)` as the projection gives it.
        keys: `(batch, tokens, heads * channels)`.
        heads: attention heads.
        scale: what the dot product is multiplied with, usually channels ** -0.5.

    Returns:
        `(batch, heads, tokens)` float32; rows sum to one.
    """
    q = rearrange(query.float(), "batch 1 (heads channels) -> batch heads channels", heads=heads)
    split = "batch tokens (heads channels) -> batch heads channels tokens"
    k = rearrange(keys.float(), split, heads=heads)
    logits = (q[:, :, None, :] @ k).squeeze(2) * scale
    return torch.softmax(logits, dim=-1)
