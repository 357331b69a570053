"""LLaVA-NeXT cuts pictures into crops; tokens are counted for a row's picture all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlavaNextImageProcessor, LlavaNextProcessor, PreTrainedTokenizerFast

from support.llava import BOS, EOS, IMAGE, PAD
from support.llava_next import PATCH, PATCHES, PINPOINTS, SIDE, tiny_llava_next
from tokenprune.batch import Answerer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaVA-NeXT with a processor."""
    folder = tmp_path_factory.mktemp("next")
    named = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<image>": IMAGE}
    free = (number for number in range(100) if number not in named.values())
    words = {f"w{number}": number for number in free}
    tokenizer = Tokenizer(WordLevel({**named, **words}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    processor = LlavaNextProcessor(
        LlavaNextImageProcessor(
            size={"shortest_edge": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_grid_pinpoints=PINPOINTS,
        ),
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            eos_token="</s>",
            extra_special_tokens={"image_token": "<image>"},
        ),
        patch_size=PATCH,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )
    tiny_llava_next().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("spec", "kept"),
    [
        ("cls-attention | evict(9) @ before-llm", [9, 9, 9]),
        ("cls-attention | evict(2, per='crop') @ before-llm", [2 * 5, 2 * 3, 2 * 4]),
        ("uniform | evict(7) @ after-layer(1)", [7, 7, 7]),
    ],
)
def test_tokens_of_a_picture_in_crops(spec: str, kept: list[int], checkpoint: Path) -> None:
    """Rows as in a batch of different shapes, and as alone."""
    pictures: list[object] = [
        Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50) for size in [(64, 64), (64, 32), (96, 30)]
    ]
    rows = {"image": pictures, "prompt": ["w5 <image> w7 w8", "<image> w9", "w5 w6 <image> w7"]}
    answerer = Answerer(str(checkpoint), spec, max_new_tokens=4)
    together = answerer(rows)
    assert together["tokens_after"] == kept
    assert all(before >= PATCHES for before in together["tokens_before"])
    for row, picture in enumerate(pictures):
        alone = answerer({"image": [picture], "prompt": [rows["prompt"][row]]})
        for name, column in together.items():
            if name != "prompt":
                assert alone[name] == [column[row]]
