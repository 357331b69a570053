"""Tiny towers of open_clip with peaked attention, and their attention maps by other means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from open_clip.timm_model import TimmModel
from open_clip.transformer import Transformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SIDE, PATCH, LAYERS, WIDTH, HEADS = 48, 8, 5, 32, 4
PATCHES = (SIDE // PATCH) ** 2


def pictures(count: int = 3, side: int = SIDE) -> Tensor:
    """`(count, 3, side, side)`; each is the same whatever `count` is."""
    made = [
        torch.randn(3, side, side, generator=torch.Generator().manual_seed(n)) for n in range(count)
    ]
    return torch.stack(made)


def peaked(tower: nn.Module) -> nn.Module:
    """Weights that are all random, biases and norms too, such that attention is peaked."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in tower.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim < 2:
                weight.copy_(noise * 0.3 + (1.0 if name.endswith("weight") else 0.0))
            elif any(
                part in name for part in ("in_proj", "qkv", "q_proj", "k_proj", ".q.", ".kv.")
            ):
                weight.copy_(noise * 2.0 / weight.shape[-1] ** 0.5)
            else:
                weight.copy_(noise / weight.flatten(1).shape[1] ** 0.5)
    return tower.eval()


def native(embed_dim: int = 16, **options: Any) -> nn.Module:
    """A ViT of open_clip's own."""
    sizes: dict[str, Any] = {"layers": LAYERS, "width": WIDTH, "head_width": WIDTH // HEADS}
    sizes |= {"patch_size": PATCH, "image_size": SIDE}
    return peaked(_build_vision_tower(embed_dim, CLIPVisionCfg(**{**sizes, **options})))


def tokens_first() -> nn.Module:
    """A ViT whose blocks take `(tokens, batch, channels)`."""
    tower: Any = native()
    blocks = Transformer(WIDTH, LAYERS, HEADS, batch_first=False)
    blocks.load_state_dict(tower.transformer.state_dict())
    tower.transformer = blocks
    return tower.eval()


def qk_norm() -> nn.Module:
    return native(block_type="custom", qk_norm=True)


def coca(**options: Any) -> nn.Module:
    options = {
        "attentional_pool": True,
        "attn_pooler_heads": 4,
        "attn_pooler_queries": 8,
        **options,
    }
    return native(output_tokens=True, **options)


def _timm(trunk: nn.Module) -> nn.Module:
    tower: Any = TimmModel("test_vit", 16, image_size=SIDE)
    tower.trunk = trunk
    tower.head = nn.Sequential(nn.Linear(WIDTH, 16, bias=False))
    return peaked(tower)


_COMMON: dict[str, Any] = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH}
_COMMON |= {"depth": LAYERS, "num_heads": HEADS, "num_classes": 0}


def eva(**options: Any) -> nn.Module:
    """EVA: [CLS], learned positions, no rotation; with two registers."""
    return _timm(Eva(**{**_COMMON, "global_pool": "token", "num_reg_tokens": 2, **options}))


def eva02(**options: Any) -> nn.Module:
    """EVA-02: rotated queries and keys, separate projections, a norm after the attention."""
    options = {"use_rot_pos_emb": True, "qkv_fused": False, "scale_attn_inner": True, **options}
    return eva(use_abs_pos_emb=True, **options)


_HAS_MIXED = "rope_type" in signature(Eva).parameters  # newer timm alone


def eva_mixed() -> nn.Module:
    """Rotations that differ between layers and heads."""
    return eva02(rope_type="mixed")


def perception() -> nn.Module:
    """PE: [CLS], rotation, and an attention pool over all of it."""
    return eva02(attn_type="rope", global_pool="map", qkv_fused=True)


def siglip(**options: Any) -> nn.Module:
    return _timm(TimmViT(**{**_COMMON, "class_token": False, "global_pool": "map", **options}))


def averaged() -> nn.Module:
    return siglip(global_pool="avg", qk_norm=True)


TOWERS: dict[str, Callable[[], nn.Module]] = {
    maker.__name__: lru_cache(maker)
    for maker in (
        native,
        tokens_first,
        qk_norm,
        coca,
        eva,
        eva02,
        *([eva_mixed] if _HAS_MIXED else []),
        perception,
        siglip,
        averaged,
    )
}
"""Makers of towers, each of which is made once and must be left as it was."""

WITH_CLS = tuple(name for name in TOWERS if name not in ("siglip", "averaged"))
WITH_POOL = ("coca", "perception", "siglip")


def blocks_of(tower: Any) -> Any:
    return tower.trunk.blocks if hasattr(tower, "trunk") else tower.transformer.resblocks


def prefix_of(tower: Any) -> int:
    return tower.trunk.num_prefix_tokens if hasattr(tower, "trunk") else 1


class Watch(TorchFunctionMode):
    """Notes queries and keys of every `scaled_dot_product_attention`."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            self.seen.append((args[0], args[1]))
        return func(*args, **(kwargs or {}))


@contextmanager
def _asked_for_weights(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Weights by `need_weights=True`, which changes what is returned in the last bits."""
    found: list[Tensor] = []

    def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "need_weights": True, "average_attn_weights": False}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output[1])

    handles = [m.register_forward_pre_hook(ask, with_kwargs=True) for m in modules]
    handles += [m.register_forward_hook(note) for m in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def maps(tower: nn.Module, x: Tensor) -> list[Tensor]:
    """`(batch, heads, queries, keys)` attention, of every block and then of a pool if there is one.

    Of `nn.MultiheadAttention` by `need_weights=True`; else from what enters torch's own function.
    """
    fused = [m for m in tower.modules() if type(m) is nn.MultiheadAttention]
    if fused:
        with _asked_for_weights(fused) as weights:
            tower(x)
        return weights
    with Watch() as watch:
        tower(x)
    return [(q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) for q, k in watch.seen]


def from_transformers(tower: nn.Module) -> nn.Module:
    """The weights of a `CLIPVisionModel` in open_clip's class; its output is the pooled [CLS]."""
    config: Any = tower.config
    assert config.hidden_act in ("gelu", "quick_gelu")
    width = config.hidden_size
    made: Any = _build_vision_tower(
        width,
        CLIPVisionCfg(
            layers=config.num_hidden_layers,
            width=width,
            head_width=width // config.num_attention_heads,
            mlp_ratio=config.intermediate_size / width,
            patch_size=config.patch_size,
            image_size=config.image_size,
        ),
        quick_gelu=config.hidden_act == "quick_gelu",
    )
    held = getattr(tower, "vision_model", tower).state_dict()
    weights = {"proj": torch.eye(width)}
    for ours, theirs in (
        ("class_embedding", "embeddings.class_embedding"),
        ("conv1.weight", "embeddings.patch_embedding.weight"),
        ("positional_embedding", "embeddings.position_embedding.weight"),
    ):
        weights[ours] = held[theirs]
    for part in ("weight", "bias"):
        weights[f"ln_pre.{part}"] = held[f"pre_layrnorm.{part}"]
        weights[f"ln_post.{part}"] = held[f"post_layernorm.{part}"]
        for number in range(config.num_hidden_layers):
            block, layer = f"transformer.resblocks.{number}", f"encoder.layers.{number}"
            three = [held[f"{layer}.self_attn.{name}_proj.{part}"] for name in "qkv"]
            weights[f"{block}.attn.in_proj_{part}"] = torch.cat(three)
            for ours, theirs in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                weights[f"{block}.{ours}.{part}"] = held[f"{layer}.{theirs}.{part}"]
    made.load_state_dict(weights)
    return made.eval()
