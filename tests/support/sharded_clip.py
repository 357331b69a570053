"""A CLIP tower with the modules that vLLM's has, each process computing some of the heads.

Written from what vLLM's tower looks like from outside (`qkv_proj` that gives queries, keys and
values in one tensor, beside a bias; the last layers left out), with the weights of transformers'
tower, so that what is read from one can be compared with what is read from the other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, distributed, nn


class QKV(nn.Module):
    def __init__(self, attention: Any, mine: slice) -> None:
        super().__init__()
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.weight = torch.cat([part.weight[mine] for part in parts]).detach()
        self.bias = torch.cat([part.bias[mine] for part in parts]).detach()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight, self.bias), None


class Attention(nn.Module):
    def __init__(self, attention: Any, rank: int, ranks: int) -> None:
        super().__init__()
        self.tp_size = ranks
        self.num_heads_per_partition = attention.num_heads // ranks
        width = attention.q_proj.out_features // ranks
        mine = slice(rank * width, (rank + 1) * width)
        self.qkv_proj = QKV(attention, mine)
        self.weight = attention.out_proj.weight[:, mine].detach()
        self.bias = attention.out_proj.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        split = "batch tokens (which heads channels) -> which batch heads tokens channels"
        heads = self.num_heads_per_partition
        q, k, v = rearrange(self.qkv_proj(x)[0], split, which=3, heads=heads)
        mixed = F.scaled_dot_product_attention(q, k, v)
        joined = rearrange(mixed, "batch heads tokens channels -> batch tokens (heads channels)")
        out = F.linear(joined, self.weight)
        if self.tp_size > 1:
            distributed.all_reduce(out)
        return out + self.bias


class Layer(nn.Module):
    def __init__(self, layer: Any, rank: int, ranks: int) -> None:
        super().__init__()
        self.self_attn = Attention(layer.self_attn, rank, ranks)
        self.norms = nn.ModuleList([layer.layer_norm1, layer.layer_norm2])
        self.mlp = layer.mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Encoder(nn.Module):
    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class Transformer(nn.Module):
    def __init__(self, inner: Any, config: Any, run: int, rank: int, ranks: int) -> None:
        super().__init__()
        self.config = config
        self.embeddings = inner.embeddings
        self.pre_layrnorm = inner.pre_layrnorm
        self.encoder = Encoder([Layer(each, rank, ranks) for each in inner.encoder.layers[:run]])


class ShardedClip(nn.Module):
    """The first `run` layers of `tower`, with the heads of `rank`."""

    def __init__(self, tower: Any, run: int, rank: int = 0, ranks: int = 1) -> None:
        super().__init__()
        inner = getattr(tower, "vision_model", tower)
        self.vision_model = Transformer(inner, tower.config, run, rank, ranks)

    def forward(self, pixel_values: Tensor, feature_select_strategy: str = "default") -> Tensor:
        x = self.vision_model.pre_layrnorm(self.vision_model.embeddings(pixel_values))
        for layer in self.vision_model.encoder.layers:
            x = layer(x)
        return x[:, 1:]


def tower(seed: int = 0) -> Any:
    """A tiny random CLIP tower, with attention that is far from uniform."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=24,
        patch_size=4,
    )
    made = CLIPVisionModel(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim > 1:
                scale = 1.0 if "embedding" in name else 1.6 / parameter.shape[-1] ** 0.5
                parameter.normal_(0, scale)
    return made


def pictures(count: int = 3) -> Tensor:
    """Some noise, the same in every process."""
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(5))
