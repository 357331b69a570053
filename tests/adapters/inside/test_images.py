"""Slots of images in a batch of prompts."""

from __future__ import annotations

import pytest
import torch

from tokenprune import UnsupportedError
from tokenprune_adapters.llms.images import Images


def test_part_of_an_image_is_refused() -> None:
    placeholders = torch.tensor([[False, True, True, True]])
    images = Images.alike(placeholders, 1, 4)
    with pytest.raises(UnsupportedError, match=r"part of an image \(\(4,\) tokens\).*_chunk_size"):
        images.within(torch.zeros(1, 4, 2), None)


def test_images_are_numbered_over_the_whole_batch() -> None:
    """Text is -1, and so is the place of a slot without a patch."""
    placeholders = torch.tensor([[False, True, True, False], [True, True, True, False]])
    alike = Images.alike(placeholders[:, 1:], 2, 2)
    assert alike.image.tolist() == [[0, 0, -1], [1, 1, -1]]
    assert alike.place.tolist() == [[0, 1, -1], [0, 1, -1]]
    packed = Images.of(placeholders, [torch.tensor([0, -1]), torch.tensor([5, 7, -1])])
    assert packed.image.tolist() == [[-1, 0, 0, -1], [1, 1, 1, -1]]
    assert packed.place.tolist() == [[-1, 0, -1, -1], [5, 7, -1, -1]]
    assert packed.slots == (2, 3)
    assert packed.tokens == (1, 2)
