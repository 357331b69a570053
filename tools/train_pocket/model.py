"""Untrained pocket model and its processor, from stock Hugging Face classes."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tokenprune_adapters.pocket.drawing import SIDE
from tokenprune_adapters.pocket.scene import GRID, PATCH
from tokenprune_adapters.pocket.task import WORDS

TOKENS = GRID * GRID
WIDTH = 96
FEATURE_LAYER = -2
VOCABULARY = ("<pad>", "<unk>", "<s>", "</s>", "<image>", "user:", "assistant:", *WORDS)
PAD, BOS, EOS, IMAGE = (VOCABULARY.index(word) for word in ("<pad>", "<s>", "</s>", "<image>"))
_TOWER_NAME, _HUB_NAME = r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."
MEAN = STD = (0.5, 0.5, 0.5)

_CHAT = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image> {% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def config() -> LlavaConfig:
    """Six vision layers, the stock projector, eight language layers, all 96 channels wide."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=WIDTH,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=WIDTH,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.1,  # about 1 / sqrt(channels); with 0.02 attention hardly starts
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=TOKENS,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=FEATURE_LAYER,
        tie_word_embeddings=False,
    )


def build(seed: int) -> LlavaForConditionalGeneration:
    """A model with random float32 weights, the same for the same seed."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config())
    model.generation_config = GenerationConfig(
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, max_new_tokens=2, do_sample=False
    )
    return model


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write float16 weights and the processor, such that transformers 5.4 and newer can read them.

    transformers 5.23 drops `vision_model` from the names of a tower's weights; versions old and
    new read the names that the hub's LLaVA checkpoints have.
    """
    folder.mkdir(parents=True, exist_ok=True)
    halved = copy.deepcopy(model).half()
    halved.save_pretrained(folder)
    build_processor().save_pretrained(folder)
    file = folder / "model.safetensors"
    weights = {re.sub(_TOWER_NAME, _HUB_NAME, name): w for name, w in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    file.chmod(0o644)


def build_processor() -> LlavaProcessor:
    """Words to tokens, pictures to pixels, padding on the left."""
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>")
    )
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("?", "isolated")]
    )
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=512,
        extra_special_tokens={"image_token": "<image>"},
    )
    return LlavaProcessor(
        image_processor=_image_processor(),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT,
    )


def _image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
