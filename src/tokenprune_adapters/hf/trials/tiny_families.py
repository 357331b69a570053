"""Tiny models of families: five decoder layers, towers of three or four, 100 words."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

IMAGE, VIDEO, START, END = 90, 91, 92, 93
"""Token ids: placeholders of pictures and videos, and what stands around either in Qwen."""

_TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_PLANES = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
}
_QWEN: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_QWEN_TOWER = {"depth": 4, "patch_size": 4, "in_channels": 3, "hidden_size": 32, "num_heads": 2}
_QWEN3_TOWER = _QWEN_TOWER | {
    "out_hidden_size": 32,
    "intermediate_size": 48,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 2],
}
_QWEN3_TEXT = _PLANES | {"head_dim": 8}
_QWEN35_TOWER = _QWEN_TOWER | {
    "out_hidden_size": 32,
    "intermediate_size": 48,
    "num_position_embeddings": 64,
}
_QWEN35_TEXT: dict[str, Any] = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2 + ["linear_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": _PLANES["rope_parameters"]
    | {"mrope_interleaved": True, "partial_rotary_factor": 1.0},
}
_SHARED = {"shared_expert_intermediate_size": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_PIXTRAL = _TOWER | {"model_type": "pixtral", "head_dim": 16, "image_size": 64}
_CLIP = _TOWER | {"model_type": "clip_vision_model"}
_MISTRAL = {"model_type": "mistral", "sliding_window": None}
_PINPOINTS = [[16, 32], [32, 16], [32, 32]]


def _model(
    kind: str,
    vision: dict[str, Any],
    text: dict[str, Any],
    *,
    attention: str = "sdpa",
    **more: Any,
) -> Any:
    import torch
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        text_config=_TEXT | text,
        vision_config=dict(vision),
        attn_implementation=attention,
        **{"image_token_id": IMAGE} | more,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some of these weights are drawn anew, others are not
        return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def _idefics(kind: str) -> Callable[..., Any]:
    vision = _TOWER | {"image_size": 32}
    more: dict[str, Any] = {"tie_word_embeddings": False, "scale_factor": 2}
    return partial(_model, kind, vision, {"model_type": "llama"}, **more)


TINY: dict[str, Callable[..., Any]] = {
    "llava": partial(_model, "Llava", _CLIP, {"model_type": "llama"}, tie_word_embeddings=False),
    "llava-next": partial(
        _model,
        "LlavaNext",
        _CLIP,
        {"model_type": "llama"},
        tie_word_embeddings=False,
        image_grid_pinpoints=_PINPOINTS,
    ),
    "video-llava": partial(
        _model,
        "VideoLlava",
        _CLIP,
        {"model_type": "llama"},
        tie_word_embeddings=False,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    ),
    "qwen2-vl": partial(
        _model, "Qwen2VL", _QWEN_TOWER | {"embed_dim": 32, "mlp_ratio": 2}, _PLANES, **_QWEN
    ),
    "qwen2.5-vl": partial(
        _model,
        "Qwen2_5_VL",
        _QWEN_TOWER
        | {
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "window_size": 16,
            "fullatt_block_indexes": [1, 3],
        },
        _PLANES,
        **_QWEN,
    ),
    "qwen3-vl": partial(_model, "Qwen3VL", _QWEN3_TOWER, _QWEN3_TEXT, **_QWEN),
    "qwen3-vl-moe": partial(_model, "Qwen3VLMoe", _QWEN3_TOWER, _QWEN3_TEXT | _EXPERTS, **_QWEN),
    "qwen3.5": partial(_model, "Qwen3_5", _QWEN35_TOWER, _QWEN35_TEXT, **_QWEN),
    "qwen3.5-moe": partial(
        _model, "Qwen3_5Moe", _QWEN35_TOWER, _QWEN35_TEXT | _EXPERTS | _SHARED, **_QWEN
    ),
    "internvl": partial(
        _model,
        "InternVL",
        _TOWER | {"image_size": [32, 32], "patch_size": [4, 4], "use_qk_norm": True},
        {"model_type": "qwen2"},
        tie_word_embeddings=False,
        image_seq_length=16,
        vision_feature_layer=-1,
    ),
    "llava-onevision": partial(
        _model,
        "LlavaOnevision",
        _TOWER | {"model_type": "siglip_vision_model"},
        {"model_type": "qwen2"},
        tie_word_embeddings=False,
        video_token_id=VIDEO,
        image_grid_pinpoints=_PINPOINTS,
        vision_feature_layer=-1,
    ),
    "llava-next-video": partial(
        _model,
        "LlavaNextVideo",
        _CLIP,
        {"model_type": "llama"},
        tie_word_embeddings=False,
        video_token_id=VIDEO,
        image_grid_pinpoints=_PINPOINTS,
    ),
    "smolvlm": _idefics("SmolVLM"),
    "idefics3": _idefics("Idefics3"),
    "vipllava": partial(
        _model,
        "VipLlava",
        _CLIP,
        {"model_type": "llama"},
        tie_word_embeddings=False,
        image_seq_length=16,
        vision_feature_layers=[-1, -2],
    ),
    "mistral3": partial(
        _model,
        "Mistral3",
        _PIXTRAL,
        _MISTRAL,
        tie_word_embeddings=False,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    ),
    "llava-pixtral": partial(
        _model,
        "Llava",
        _PIXTRAL,
        _MISTRAL,
        tie_word_embeddings=False,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
}
"""Tiny model of each, made for an `attention` implementation, with the library's own weights."""
