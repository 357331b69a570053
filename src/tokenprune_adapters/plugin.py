"""Plugin of this package. Models are claimed by class name, so nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from tokenprune.adapter import ModelAdapter, TowerAdapter
from tokenprune.plugins import ModelPlugin, TowerPlugin, hookimpl
from tokenprune.trial import Trial

if TYPE_CHECKING:
    from .hf.family import Family


def _clip() -> TowerAdapter:
    from .hf.encoder_tower import ClipTowerAdapter

    return ClipTowerAdapter()


def _siglip() -> TowerAdapter:
    from .hf.encoder_tower import SiglipTowerAdapter

    return SiglipTowerAdapter()


def _dinov2() -> TowerAdapter:
    from .hf.encoder_tower import Dinov2TowerAdapter

    return Dinov2TowerAdapter()


def _open_clip() -> TowerAdapter:
    from .open_clip.tower import OpenClipTowerAdapter

    return OpenClipTowerAdapter()


def _open_clip_visual() -> ModelAdapter:
    from .open_clip.visual import OpenClipVisualAdapter

    return OpenClipVisualAdapter()


def _llava_trials() -> Iterable[Trial]:
    from .hf.trials.llava import trials

    return trials()


def _llava_next_trials() -> Iterable[Trial]:
    from .hf.trials.llava_next import trials

    return trials()


def _video_llava_trials() -> Iterable[Trial]:
    from .hf.trials.video_llava import trials

    return trials()


def _family_trials(family: Family) -> Iterable[Trial]:
    from .hf.trials.families import trials

    return trials(family)


def _open_clip_facts() -> dict[str, str]:
    return {"takes": "images", "placements": "after-layer", "budgets are for a": "picture"}


def _open_clip_trials() -> Iterable[Trial]:
    from .open_clip.trial import trials

    return trials()


_OPEN_CLIP = (
    "open_clip.transformer.VisionTransformer",
    "open_clip.timm_model.TimmModel",
)


@hookimpl
def tokenprune_towers() -> Iterable[TowerPlugin]:
    """Vision towers of transformers and open_clip."""
    yield TowerPlugin(
        "hf-clip",
        "CLIP vision towers of transformers: [CLS] rows and keys by hooks on q_proj and k_proj",
        _clip,
        ("transformers.models.clip.modeling_clip.CLIPVisionModel",),
    )
    yield TowerPlugin(
        "hf-siglip",
        "SigLIP vision towers of transformers: attention received, pooling head, keys; no [CLS]",
        _siglip,
        ("transformers.models.siglip.modeling_siglip.SiglipVisionModel",),
    )
    yield TowerPlugin(
        "hf-siglip2",
        "SigLIP2 towers of transformers with patches in a row; pictures of one shape",
        _siglip,
        ("transformers.models.siglip2.modeling_siglip2.Siglip2VisionModel",),
    )
    yield TowerPlugin(
        "hf-dinov2",
        "DINOv2 of transformers, with and without registers: [CLS] rows, attention received, keys",
        _dinov2,
        (
            "transformers.models.dinov2.modeling_dinov2.Dinov2Model",
            "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers."
            "Dinov2WithRegistersModel",
        ),
    )
    yield TowerPlugin(
        "open-clip",
        "model.visual of open_clip, ViTs of its own and of timm: [CLS] rows, keys, attention pools",
        _open_clip,
        _OPEN_CLIP,
    )


@hookimpl
def tokenprune_models() -> Iterable[ModelPlugin]:
    """Models of transformers, and towers of open_clip as models of their own."""
    from .hf.families import FAMILIES
    from .hf.family_plugin import family_plugin

    own = {
        "hf-llava": _llava_trials,
        "hf-llava-next": _llava_next_trials,
        "hf-video-llava": _video_llava_trials,
    }
    for family in FAMILIES:
        yield family_plugin(family, own.get(family.name, partial(_family_trials, family)))
    yield ModelPlugin(
        "open-clip-visual",
        "model.visual of open_clip, after blocks: encode_image itself gets faster",
        _open_clip_visual,
        _OPEN_CLIP,
        _open_clip_trials,
        _open_clip_facts,
    )
