"""Recipes: the papers' methods as data. Each expands to a spec in plain sight."""

from __future__ import annotations

from .plugins.types import RecipePlugin

_VTC = "Wang et al., arXiv 2412.05819"
_PRUMERGE = "Shang et al., arXiv 2403.15388"

RECIPES: tuple[RecipePlugin, ...] = (
    RecipePlugin(
        "vtc-cls",
        "VTC-CLS: [CLS] attention averaged over K = 3 layers, evicted before the LLM",
        template="cls-attention(layers={layers}, ensemble={ensemble}) | evict({keep}) @ before-llm",
        defaults={"keep": 128, "layers": 3, "ensemble": "avg"},
        paper=_VTC,
        differs=(
            "scores in float32 (the released code ranks in fp16); K = 3 as in the paper (the "
            "released default, --layer 16, is K = 7); any batch size; ensembles of "
            "its table 5 other than avg are in the paper alone"
        ),
    ),
    RecipePlugin(
        "fastervlm",
        "FasterVLM: [CLS] attention of the layer that gives the features, evicted before the LLM",
        template=(
            "cls-attention(layers=1) | evict({keep}, per='crop') @ before-llm(newline={newline})"
        ),
        defaults={"keep": 0.25, "newline": "keep"},
        paper="Zhang et al., arXiv 2412.01818",
        differs=(
            "reduced before the projector instead of after it (the same rows, less work); on "
            "LLaVA-NeXT the model's own grid and unpadding stay (the released code changes both), "
            "and newlines too (the released code drops them: newline='drop'); "
            "on Video-LLaVA pictures are reduced like frames (the released code leaves them whole)"
        ),
    ),
    RecipePlugin(
        "random",
        "random tokens, from a seed: the control in VTC-CLS's table 3",
        template="random(seed={seed}) | evict({keep}) @ before-llm",
        defaults={"keep": 128, "seed": 0},
        paper=_VTC,
        differs="there is no released code; the same picture always gets the same scores",
    ),
    RecipePlugin(
        "uniform",
        "an even stride over the raster: the floor that costs nothing",
        template="uniform | evict({keep}) @ before-llm",
        defaults={"keep": 128},
    ),
    RecipePlugin(
        "tome",
        "ToMe as VTC-CLS's table 3 uses it: bipartite matching of the tower's output",
        template="tome({keep}) @ before-llm",
        defaults={"keep": 128},
        paper="Bolya et al., arXiv 2210.09461; baseline of " + _VTC,
        differs=(
            "neither paper says how 576 become 128: in halving rounds (576, 288, 144, 128) here, "
            "on features, in raster order; ToMe itself merges inside every layer of the tower"
        ),
    ),
    RecipePlugin(
        "kmeans",
        "KMeans as VTC-CLS's table 3 uses it: cluster means of the tower's output",
        template="kmeans({keep}) @ before-llm",
        defaults={"keep": 128},
        paper="baseline of " + _VTC,
        differs=(
            "there is no released code, and start and iterations are unspecified: greedy "
            "k-means++ from a seed and 20 iterations here"
        ),
    ),
    RecipePlugin(
        "prumerge",
        "LLaVA-PruMerge: outliers of [CLS] attention stay, the others merge into them",
        template="prumerge(keep={keep}) @ before-llm",
        defaults={"keep": None},
        paper=_PRUMERGE,
        differs=(
            "raster order instead of order of attention; quartiles per image instead of per batch; "
            "fewer than 33 tokens work"
        ),
    ),
    RecipePlugin(
        "prumerge-plus",
        "LLaVA-PruMerge+: outliers and tokens sampled evenly stay, the others merge into them",
        template="prumerge-plus(keep={keep}) @ before-llm",
        defaults={"keep": None},
        paper=_PRUMERGE,
        differs=(
            "as prumerge; the last token can be sampled too (the released code stops at 575); "
            "without outliers, or with more than a third, it samples instead of failing"
        ),
    ),
    RecipePlugin(
        "vispruner",
        "VisPruner: half of the budget for [CLS] attention, half for diversity among the rest",
        template=(
            "cls-attention(layers=1) | important-diverse({keep}, important={important}) "
            "@ before-llm"
        ),
        defaults={"keep": 128, "important": 0.5},
        paper="Zhang et al., arXiv 2412.01818 (version 2)",
        differs=(
            "works where the released code fails (an odd number of tokens left, small pictures); "
            "cosines rounded to 2^-24, so that ties are ties: which diverse tokens stay depends on "
            "the last digits in any implementation"
        ),
    ),
    RecipePlugin(
        "visionzip",
        "VisionZip: dominant tokens by [CLS] attention, the rest merged into contextual ones",
        template=(
            "cls-attention(layers=1) | dominant-contextual({keep}, contextual={contextual}) "
            "@ before-llm"
        ),
        defaults={"keep": 64, "contextual": 0.15625},
        paper="Yang et al., arXiv 2412.04467",
        differs=(
            "all tokens are patches (the released code counts [CLS] among the dominant ones and "
            "shows it to the LLM); contextual tokens are means (released: target + mean of the "
            "others, normalize=False); raster order; newlines of LLaVA-NeXT stay"
        ),
    ),
    RecipePlugin(
        "divprune",
        "DivPrune: tokens that are farthest from each other",
        template="diverse({keep}) @ before-llm",
        defaults={"keep": 0.098},
        paper="Alvar et al., arXiv 2503.02175",
        differs=(
            "distances before the projector instead of after it; no token is chosen twice; every "
            "image has its own budget, and newlines of LLaVA-NeXT are no candidates"
        ),
    ),
    RecipePlugin(
        "fopru",
        "FoPru: attention received or given in the tower, by token or by row of the grid",
        template="fopru(mode={mode}) | evict({keep}) @ before-llm",
        defaults={"keep": 0.25, "mode": "rank"},
        paper="Jiang et al., arXiv 2411.14164",
        differs=(
            "written from a second-hand description, not compared with released code; needs both "
            "margins of the attention matrix"
        ),
    ),
)
