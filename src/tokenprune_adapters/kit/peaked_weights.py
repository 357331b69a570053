"""Random weights that make attention peaked, so that it shows which tokens are kept."""

from __future__ import annotations

import torch
from torch import nn

ASKING = ("q_proj", "k_proj", "in_proj", "qkv")
UNSCALED = ("embed_tokens", "position", "pos_embed")
NORMS = ("norm", "ln_")
GAINS = {"mlp": 0.5, "projector": 1.0, "lm_head": 3.0, "head.proj": 4.0}


@torch.no_grad()
def peaked(model: nn.Module, seed: int = 4) -> nn.Module:
    """`model` with new weights, the same for the same seed.

    Attention is peaked and residuals are calm: other tokens move logits by more than 1, while
    rounding stays near 1e-5. With the usual initialisation every token looks the same.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim < 2 and "class_embedding" not in name:
            is_scale = name.endswith("weight") and any(part in name for part in NORMS)
            weight.copy_(0.1 * noise + float(is_scale))
            continue
        gain = next((gain for part, gain in GAINS.items() if part in name), 0.8)
        gain = 1.5 if any(part in name for part in ASKING) else gain
        whole = weight.ndim < 2 or any(part in name for part in UNSCALED)
        weight.copy_(noise * gain / (1 if whole else weight[0].numel()) ** 0.5)
    return model.eval()
