"""Families that are shipped, each by a few lines of data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from .anyres import Packing
from .family import Encoded, Family, Sight, Tower
from .names import Call
from .outputs import Field, Output
from .slot_patches import (
    by_global_view,
    by_run,
    cls_of_frames,
    connected,
    crop_of,
    frames_beside_cls,
    frames_of_elements,
    frames_of_pixels,
    last_newline,
    merged_by_window,
    merged_in_a_row,
    merged_of_any_size,
    one_by_one,
    packed_crops,
    packed_grid,
    patches_in_a_row,
    pictures_in_a_row,
    pixels_of_tiles,
    pooled_by_halves,
    pooled_by_squares,
    qwen_times,
    shuffled,
    tiles_of_prompts,
)


def _hf(*names: str) -> tuple[str, ...]:
    """Full names of classes: module and class in turn."""
    pairs = zip(names[::2], names[1::2], strict=True)
    return tuple(f"transformers.models.{at}.modeling_{at}.{name}" for at, name in pairs)


IMAGES = Sight("image", "get_image_features", Call.pixels)
"""Pictures that come as elements of the features, one for each row of pixels."""


def _anyres(packed: Callable[[Encoded], Packing | None]) -> Sight:
    """Pictures with a base view and tiles, packed by their sizes."""

    def patches(encoded: Encoded) -> Sequence[Tensor] | None:
        packing = encoded.once(packed)
        return None if packing is None else packing.patches

    def crops(encoded: Encoded) -> Sequence[int] | None:
        packing = encoded.once(packed)
        return None if packing is None else packing.crops

    return replace(
        IMAGES,
        needs=(Call.sizes,),
        patches=patches,
        crops=crops,
        crop=crop_of,
        newlines=True,
    )


_LAYERS = ("vision_tower.encoder.layers", "vision_tower.vision_model.encoder.layers")
"""Where CLIP and SigLIP keep their blocks, in newer and older releases."""


def _qwen(also: tuple[Field[Any], ...] = ()) -> tuple[Sight, Sight]:
    """Pictures and videos whose patches come in a row, with a grid of time, height and width."""
    images = Sight(
        "image",
        "get_image_features",
        Call.pixels,
        (Call.image_grid,),
        pictures=pictures_in_a_row(Call.pixels, Call.image_grid),
        also=also,
    )
    videos = replace(
        images,
        kind="video",
        encode="get_video_features",
        pixels=Call.videos,
        needs=(Call.video_grid,),
        pictures=pictures_in_a_row(Call.videos, Call.video_grid),
        crops=qwen_times,
    )
    return images, videos


def _pixtral_tower(members: Callable[[Encoded], Tensor]) -> Tower:
    return Tower(
        ("vision_tower.transformer.layers",),
        members,
        attention="attention",
        packed=patches_in_a_row,
        kinds=("pixtral",),
    )


def _qwen_tower(members: Any) -> Tower:
    return Tower(("visual.blocks",), members, attention="attn", fused="qkv")


LLAVA_PIXTRAL = Family(
    "hf-llava",
    "LLaVA of transformers with a Pixtral tower",
    (),
    (IMAGES,),
    tower=_pixtral_tower(one_by_one),
)

LLAVA = Family(
    "hf-llava",
    "LLaVA of transformers, LLaVA-1.5 and its likes",
    _hf("llava", "LlavaForConditionalGeneration"),
    (IMAGES,),
    projector="multi_modal_projector",
    variants=(LLAVA_PIXTRAL,),
)

VIDEO_LLAVA = Family(
    "hf-video-llava",
    "Video-LLaVA of transformers (pictures and videos)",
    _hf("video_llava", "VideoLlavaForConditionalGeneration"),
    (
        IMAGES,
        Sight(
            "video",
            "get_video_features",
            Call.videos,
            patches=frames_beside_cls,
            crops=frames_of_elements,
            crop=crop_of,
            beside=cls_of_frames,
        ),
    ),
    towers=("image_tower", "video_tower"),
    projector="multi_modal_projector",
)

FAMILIES = (
    LLAVA,
    Family(
        "hf-llava-next",
        "LLaVA-NeXT of transformers (pictures of any resolution)",
        _hf("llava_next", "LlavaNextForConditionalGeneration"),
        (_anyres(packed_crops),),
        projector="multi_modal_projector",
        methods=(("pack_image_features", (Call.sizes, Call.select)),),
    ),
    VIDEO_LLAVA,
    Family(
        "hf-qwen2-vl",
        "Qwen2-VL of transformers (pictures and videos)",
        _hf("qwen2_vl", "Qwen2VLForConditionalGeneration"),
        _qwen(),
        towers=("visual",),
        tower=_qwen_tower(merged_in_a_row),
        planes="time, row and column",
    ),
    Family(
        "hf-qwen2-5-vl",
        "Qwen2.5-VL of transformers (pictures and videos)",
        _hf("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
        _qwen(),
        towers=("visual",),
        tower=_qwen_tower(merged_by_window),
        planes="time, row and column",
    ),
    Family(
        "hf-qwen3-vl",
        "Qwen3-VL of transformers, dense and MoE (pictures and videos)",
        _hf(
            "qwen3_vl",
            "Qwen3VLForConditionalGeneration",
            "qwen3_vl_moe",
            "Qwen3VLMoeForConditionalGeneration",
        ),
        _qwen((Output.deepstack,)),
        towers=("visual",),
        tower=_qwen_tower(merged_in_a_row),
        planes="time, row and column",
    ),
    Family(
        "hf-qwen3-5",
        "Qwen3.5 of transformers, dense and MoE (pictures and videos)",
        _hf(
            "qwen3_5",
            "Qwen3_5ForConditionalGeneration",
            "qwen3_5_moe",
            "Qwen3_5MoeForConditionalGeneration",
        ),
        _qwen(),
        towers=("visual",),
        tower=_qwen_tower(merged_in_a_row),
        planes="time, row and column",
        states=True,
        oldest=(5, 23),  # older ones mix up the states of beams
    ),
    Family(
        "hf-internvl",
        "InternVL of transformers (pictures in tiles)",
        _hf("internvl", "InternVLForConditionalGeneration"),
        (replace(IMAGES, joined=by_run),),
        tower=Tower(
            ("vision_tower.encoder.layer",),
            shuffled,
            attention="attention",
            query="q_norm",
            key="k_norm",
            prefix=1,
        ),
    ),
    Family(
        "hf-llava-onevision",
        "LLaVA-OneVision of transformers (pictures of any resolution, and videos)",
        _hf("llava_onevision", "LlavaOnevisionForConditionalGeneration"),
        (
            _anyres(packed_grid),
            Sight(
                "video",
                "get_video_features",
                Call.videos,
                patches=last_newline,
                newlines=True,
                crops=frames_of_pixels,
            ),
        ),
        tower=Tower(_LAYERS, pooled_by_halves, kinds=("siglip_vision_model",)),
    ),
    Family(
        "hf-llava-next-video",
        "LLaVA-NeXT-Video of transformers (pictures of any resolution, and videos)",
        _hf("llava_next_video", "LlavaNextVideoForConditionalGeneration"),
        (
            _anyres(packed_crops),
            Sight("video", "get_video_features", Call.videos, crops=frames_of_pixels),
        ),
        tower=Tower(_LAYERS, pooled_by_squares, prefix=1, layer=-2, kinds=("clip_vision_model",)),
        oldest=(5, 24),
    ),
    Family(
        "hf-smolvlm",
        "SmolVLM and Idefics3 of transformers (pictures in tiles)",
        _hf(
            "smolvlm",
            "SmolVLMForConditionalGeneration",
            "idefics3",
            "Idefics3ForConditionalGeneration",
        ),
        (
            Sight(
                "image",
                "get_image_features",
                Call.pixels,
                rows=tiles_of_prompts,
                pictures=pixels_of_tiles,
                joined=by_global_view,
            ),
        ),
        llm="text_model",
        towers=("vision_model",),
        tower=Tower(("vision_model.encoder.layers",), connected),
    ),
    Family(
        "hf-vipllava",
        "VipLlava of transformers",
        _hf("vipllava", "VipLlavaForConditionalGeneration"),
        (IMAGES,),
        tower=Tower(
            _LAYERS,
            one_by_one,
            prefix=1,
            layer=-2,
            kinds=("clip_vision_model",),
        ),
    ),
    Family(
        "hf-mistral3",
        "Mistral3 of transformers, with a Pixtral tower",
        _hf("mistral3", "Mistral3ForConditionalGeneration"),
        (IMAGES,),
        tower=_pixtral_tower(merged_of_any_size),
    ),
)
