"""A picture of what was kept: base view and tiles, each patch where the picture has it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tokenprune
from support.llava_next import PATCH, SIDE, SIZES, Picture, Prompt, collate, kept, tiny_llava_next
from tokenprune.cli.seen import Seen
from tokenprune.loading import Loaded

GRAY = (128, 128, 128)


@pytest.fixture(scope="module")
def loaded() -> Any:
    looks = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.1] * 3)
    return Loaded(tiny_llava_next(), SimpleNamespace(image_processor=looks))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", ["before-llm", "before-llm(newline='drop')", "after-layer(1)"])
def test_kept_patches_are_bright_where_they_are(
    loaded: Loaded, size: tuple[int, int], stage: str
) -> None:
    picture = Picture.of(size, 3)
    picture.crops.clamp_(-1, 1)
    inputs = collate([Prompt([1, 11, picture, 12])])
    with tokenprune.attach(loaded.model, f"cls-attention(layers=1) | evict(9) @ {stage}") as pruned:
        loaded.model(**inputs)
    small = Seen.of(loaded, inputs).reduced(pruned.last, scale=1)
    down, across = loaded.tiles(torch.tensor(size))
    assert small.size == (SIDE + 6 + across * SIDE, down * SIDE)
    bright = kept(loaded.model, picture, 9, "image")  # type: ignore[arg-type]
    tokens = {token for token in picture.packed if token is not None}
    assert len(picture.crops) == 1 + down * across
    for crop in range(len(picture.crops)):
        tile = crop - 1
        left = 0 if crop == 0 else SIDE + 6 + tile % across * SIDE
        top = (down * SIDE - SIDE) // 2 if crop == 0 else tile // across * SIDE
        for patch in range((SIDE // PATCH) ** 2):
            # In the middle, for a line runs along the border of what is kept.
            y, x = (PATCH * n + PATCH // 2 for n in divmod(patch, SIDE // PATCH))
            pixels = picture.crops[crop, :, y, x] * 0.1 + 0.5
            seen = [round(float(value) * 255) for value in pixels]
            got = small.getpixel((left + x, top + y))
            if (crop, patch) in bright:
                assert list(got) == seen
            elif (crop, patch) in tokens:
                assert list(got) == [int(value * 0.22) for value in seen]
            else:
                assert got == GRAY
    (left,) = pruned.report.kept
    assert set(zip(left.crop, left.patch, strict=True)) == bright
