"""Rotary position embedding (RoPE) of timm's EVA towers, as their attention applies it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RotaryEmbedding:
    """Rotary position embedding (RoPE) of timm's EVA towers.

    Attributes:
        rope: `(..., tokens, 2 * channels)` sines and cosines of the patches.
        prefix: tokens before the patches, which are not turned.
        half: which of the two layouts of timm.
    """

    rope: Tensor
    prefix: int
    half: bool

    def __call__(self, x: Tensor) -> Tensor:
        """`(batch, heads, tokens, channels)` turned; a lone prefix token comes out as it is."""
        from timm.layers.pos_embed_sincos import apply_rot_embed_cat

        front, patches = x[:, :, : self.prefix], x[:, :, self.prefix :]
        if patches.shape[2] == 0:
            return x
        layout = {"half": True} if self.half else {}  # the other layout is all that timm had first
        turned = apply_rot_embed_cat(patches, self.rope, **layout)
        return torch.cat([front, turned], dim=2).to(x.dtype)
