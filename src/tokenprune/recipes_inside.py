"""Recipes that reduce inside the LLM, after some layers have seen every visual token."""

from __future__ import annotations

from .plugins.types import RecipePlugin

RECIPES_INSIDE: tuple[RecipePlugin, ...] = (
    RecipePlugin(
        "fastv",
        "FastV: what the prompt's last token attends to, evicted after the second LLM layer",
        template=(
            "fastv(queries={queries}) | evict({keep}) @ after-layer({layer}, positions={positions})"
        ),
        defaults={"keep": 0.5, "layer": 2, "queries": "last", "positions": "original"},
        paper="Chen et al., arXiv 2403.06764",
        differs=(
            "`keep` is what stays (the paper's R is what goes); ranked by the last token as in the "
            "released code (the paper averages over all text: queries='text'), per image and per "
            "row of the batch, in float32, with padding masked; counts round half up"
        ),
    ),
    RecipePlugin(
        "vtc-cls-in-llm",
        "VTC-CLS in the LLM: its [CLS] scores, evicted after the second layer (table 6)",
        template=(
            "cls-attention(layers={layers}, ensemble={ensemble}) | evict({keep}) @ "
            "after-layer({layer})"
        ),
        defaults={"keep": 128, "layers": 3, "ensemble": "avg", "layer": 2},
        paper="Wang et al., arXiv 2412.05819",
        differs="there is no released code for table 6; positions stay as they were, as in FastV",
    ),
    RecipePlugin(
        "vtw",
        "Visual Token Withdrawal: all visual tokens leave after a layer",
        template="uniform | evict(0) @ after-layer({layer}, positions={positions})",
        defaults={"layer": 15, "positions": "original"},
        paper="Lin et al., arXiv 2405.05803",
        differs=(
            "the layer is given (15 of 32 is the released default for 7B); the paper's search for "
            "it, by the KL divergence of answers on a few samples, is left to you"
        ),
    ),
    RecipePlugin(
        "pyramiddrop",
        "PyramidDrop: half of what is left goes after each of three LLM layers",
        template=(
            "fastv(queries={queries}) | evict({keep}) @ "
            "after-layer({first}, positions={positions}); "
            "fastv(queries={queries}) | evict({keep}) @ "
            "after-layer({second}, positions={positions}); "
            "fastv(queries={queries}) | evict({keep}) @ "
            "after-layer({third}, positions={positions})"
        ),
        defaults={
            "keep": 0.5,
            "first": 8,
            "second": 16,
            "third": 24,
            "queries": "last",
            "positions": "reindexed",
        },
        paper="Xing et al., arXiv 2410.17247",
        differs=(
            "`keep` is of what a stage sees, the released fractions 0.5, 0.25, 0.125 are of the "
            "first count; ranked by the layer that has just run (the released code runs the next "
            "layer's projections ahead), per image and per row of the batch"
        ),
    ),
)
