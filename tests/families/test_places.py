"""Patches of LLaVA-OneVision keep their crop and place where tiles shrink, or are left away."""

from __future__ import annotations

from typing import Any

import torch

import tokenprune
from support.families import FAMILIES, IMAGE
from tokenprune import Kept

NAMED = {tiny.name: tiny for tiny in FAMILIES}


def kept_of(slots: list[int], aspect: str = "anyres_max_9", **given: Any) -> tuple[Kept, ...]:
    """All tokens of pictures with so many placeholders."""
    model = NAMED["llava-onevision"].make("sdpa")
    model.config.vision_aspect_ratio = aspect
    ids = torch.tensor([[token for count in slots for token in (11, *[IMAGE] * count, 12)]])
    with torch.no_grad(), tokenprune.attach(model, "random | evict(1.0)") as attachment:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), **given)
    return attachment.report.kept


def test_tiles_that_shrink() -> None:
    """8 x 8 patches of 2 x 2 tiles become 4 x 4, as many as a crop has."""
    pixels = torch.randn(1, 5, 3, 16, 16)
    (kept,) = kept_of(
        [16 + 4 * 5],
        pixel_values=pixels,
        image_sizes=torch.tensor([[32, 32]]),
        aspect="anyres_max_1",
    )
    assert kept.of(0) == tuple(range(16))
    for tile in range(1, 5):  # each token is made of four; here the first of them is as near as any
        assert kept.of(tile) == (0, 2, 8, 10)


def test_one_of_several_pictures_has_no_tiles() -> None:
    several = kept_of(
        [17, 17],
        pixel_values=torch.randn(2, 1, 3, 16, 16),
        image_sizes=torch.tensor([[32, 32], [16, 32]]),
        batch_num_images=torch.tensor([2]),
    )
    assert [each.of(0) for each in several] == [tuple(range(16))] * 2
    assert all(set(each.crop) == {0} for each in several)
