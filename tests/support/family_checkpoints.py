"""Folders of tiny families with their processors, for programs that load models by their path.

The processor is the family's own: an image processor from its config, a tokenizer of single words
that has the family's special tokens at the ids of the tiny models, and a chat template.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .families import IMAGE, START, VIDEO, Tiny

WORDS = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"word{n}": n for n in range(4, 90)}

TEMPLATE = (
    "{{ bos_token }} {% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %} {{ part['text'] }}{% else %} PLACE{% endif %}"
    "{% endfor %}{% endfor %}"
)
"""Words in a row; PLACE is the placeholder of a picture."""

QWEN = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}


def _qwen(kind: str) -> Any:
    def build(tokenizer: Any) -> Any:
        sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
        size = {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}
        video = "Qwen3VLVideoProcessor" if "3" in kind else "Qwen2VLVideoProcessor"
        return getattr(transformers, f"{kind}Processor")(
            transformers.Qwen2VLImageProcessor(**sizes, size=size),
            tokenizer,
            getattr(transformers, video)(**sizes, size=size),
        )

    return build


def _internvl(tokenizer: Any) -> Any:
    looks = {"size": {"height": 32, "width": 32}}
    return transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(
            **looks, crop_to_patches=True, min_patches=2, max_patches=4
        ),
        tokenizer,
        transformers.InternVLVideoProcessor(**looks),
        image_seq_length=16,
    )


SQUARE: dict[str, Any] = {
    "size": {"shortest_edge": 16},
    "crop_size": {"height": 16, "width": 16},
}
"""Pictures of LLaVA models with CLIP towers."""
COUNTS: dict[str, Any] = {
    "patch_size": 4,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}
"""By which their processors count placeholders."""
PINPOINTS = [[16, 32], [32, 16], [32, 32]]


def _onevision(tokenizer: Any) -> Any:
    looks = {"size": {"height": 16, "width": 16}}
    return transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(**looks, image_grid_pinpoints=PINPOINTS),
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(**looks),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )


def _next_video(tokenizer: Any) -> Any:
    return transformers.LlavaNextVideoProcessor(
        transformers.LlavaNextVideoVideoProcessor(**SQUARE),
        transformers.LlavaNextImageProcessor(**SQUARE, image_grid_pinpoints=PINPOINTS),
        tokenizer,
        **COUNTS,
    )


def _next(tokenizer: Any) -> Any:
    return transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessor(**SQUARE, image_grid_pinpoints=PINPOINTS),
        tokenizer,
        **COUNTS,
    )


def _video_llava(tokenizer: Any) -> Any:
    return transformers.VideoLlavaProcessor(
        transformers.VideoLlavaImageProcessor(**SQUARE),
        transformers.VideoLlavaVideoProcessor(**SQUARE),
        tokenizer,
        **COUNTS,
    )


def _idefics(tokenizer: Any) -> Any:
    """Also of SmolVLM, whose own processor makes the same of pictures, but needs num2words."""
    sizes = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    looks = transformers.Idefics3ImageProcessor(**sizes)
    return transformers.Idefics3Processor(looks, tokenizer, image_seq_len=16)


def _llava(tokenizer: Any) -> Any:
    return transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(**SQUARE),
        tokenizer,
        **COUNTS,
    )


def _pixtral(merged: int) -> Any:
    def build(tokenizer: Any) -> Any:
        patch = 4 * merged
        looks = {"size": {"longest_edge": 32}, "patch_size": {"height": patch, "width": patch}}
        return transformers.PixtralProcessor(
            transformers.PixtralImageProcessor(**looks),
            tokenizer,
            patch_size=4,
            spatial_merge_size=merged,
        )

    return build


LLAVA = {"image_token": "<image>", "video_token": "<video>"}
IDEFICS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
PIXTRAL = {"image_token": "[IMG]", "break": "[IMG_BREAK]", "end": "[IMG_END]"}
INTERN = {
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
}

PROCESSORS: dict[str, tuple[Any, dict[str, str], str]] = {
    "llava": (_llava, LLAVA, ""),
    "llava-next": (_next, LLAVA, ""),
    "video-llava": (_video_llava, LLAVA, ""),
    "qwen2-vl": (_qwen("Qwen2VL"), QWEN, ""),
    "qwen2.5-vl": (_qwen("Qwen2_5_VL"), QWEN, ""),
    "qwen3-vl": (_qwen("Qwen3VL"), QWEN, ""),
    "qwen3-vl-moe": (_qwen("Qwen3VL"), QWEN, ""),
    "qwen3.5": (_qwen("Qwen3VL"), QWEN, ""),
    "qwen3.5-moe": (_qwen("Qwen3VL"), QWEN, ""),
    "internvl": (_internvl, INTERN, "<IMG_CONTEXT>"),
    "llava-onevision": (_onevision, LLAVA, ""),
    "llava-next-video": (_next_video, LLAVA, ""),
    "smolvlm": (_idefics, IDEFICS, ""),
    "idefics3": (_idefics, IDEFICS, ""),
    "vipllava": (_llava, LLAVA, ""),
    "mistral3": (_pixtral(2), PIXTRAL, ""),
    "llava-pixtral": (_pixtral(1), PIXTRAL, ""),
}


def _tokenizer(names: dict[str, str]) -> Any:
    """Of single words; special tokens stand at the ids of the tiny models, from 90 on."""
    at = [IMAGE, VIDEO, START, 93, 94, 95]
    image, *others = names.values()
    kinds = [image, *([others.pop(0)] if "video_token" in names else ["<video>"]), *others]
    vocabulary = WORDS | dict(zip(kinds, at, strict=False))
    vocabulary |= {f"<extra{n}>": n for n in range(90, 100) if n not in vocabulary.values()}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens={name: token for name, token in names.items() if "token" in name},
    )
    made.add_tokens(kinds, special_tokens=True)
    made.add_tokens([word for word in WORDS if word.startswith("word")])  # whole, to any class
    return made


def saved(tiny: Tiny, place: Path) -> Path:
    """Folder of a tiny family with its processor."""
    build, names, placeholder = PROCESSORS[tiny.name]
    tokenizer = _tokenizer(names)
    processor = build(tokenizer)
    placeholder = placeholder or names["image_token"]
    processor.chat_template = TEMPLATE.replace("PLACE", placeholder)
    tiny.make("sdpa").save_pretrained(place)
    processor.save_pretrained(place)
    return place
