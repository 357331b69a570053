"""Recipes: the papers' methods as data. Each expands to a spec in plain sight."""

from __future__ import annotations

from .plugins.types import RecipePlugin

RECIPES: tuple[RecipePlugin, ...] = (
    RecipePlugin(
        "vtc-cls",
        "VTC-CLS: [CLS] attention averaged over K = 3 layers, evicted before the LLM",
        template="cls-attention(layers={layers}, ensemble={ensemble}) | evict({keep}) @ before-llm",
        defaults={"keep": 128, "layers": 3, "ensemble": "avg"},
        paper="Wang et al., arXiv 2412.05819",
        differs=(
            "scores in float32 (the released code ranks in fp16); K = 3 as in the paper (the "
            "released default, --layer 16, is K = 7); any batch size"
        ),
    ),
    RecipePlugin(
        "fastervlm",
        "FasterVLM: [CLS] attention of the layer that gives the features, evicted before the LLM",
        template="cls-attention(layers=1) | evict({keep}, per='crop') @ before-llm",
        defaults={"keep": 0.25},
        paper="Zhang et al., arXiv 2412.01818",
        differs=(
            "reduced before the projector instead of after it (the same rows, less work); on "
            "LLaVA-NeXT the model's own grid and unpadding stay (the released code changes both)"
        ),
    ),
)
