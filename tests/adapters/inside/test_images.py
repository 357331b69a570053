"""Slots of images in a batch of prompts."""

from __future__ import annotations

import pytest
import torch

from tokenprune import ClsAttention, Plan, Signals, UnsupportedError
from tokenprune_adapters.hf.llm.image_slots import Images, Seats, feature_prints
from tokenprune_adapters.hf.llm.signal_cache import SignalCache


def test_part_of_an_image_is_refused() -> None:
    placeholders = torch.tensor([[False, True, True, True]])
    images = Images.alike(placeholders, 1, 4)
    with pytest.raises(UnsupportedError, match=r"part of an image \(\(4,\) tokens\).*_chunk_size"):
        images.printed(torch.zeros(1, 4, 2)).asked()


def test_images_are_numbered_over_the_whole_batch() -> None:
    """Text is -1, and so is the patch of a slot without a patch."""
    placeholders = torch.tensor([[False, True, True, False], [True, True, True, False]])
    alike = Images.alike(placeholders[:, 1:], 2, 2)
    assert alike.image.tolist() == [[0, 0, -1], [1, 1, -1]]
    assert alike.patch.tolist() == [[0, 1, -1], [0, 1, -1]]
    packed = Images.of(placeholders, [torch.tensor([0, -1]), torch.tensor([5, 7, -1])])
    assert packed.image.tolist() == [[-1, 0, 0, -1], [1, 1, 1, -1]]
    assert packed.patch.tolist() == [[-1, 0, -1, -1], [5, 7, -1, -1]]
    assert packed.slots == (2, 3)
    assert packed.tokens == (1, 2)


def test_padding_of_an_image_drops_nothing() -> None:
    """The second image has one token less than the first; slot 1 is text."""
    index, mask = torch.tensor([[0, 2], [3, 0]]), torch.tensor([[True, True], [True, False]])
    plan = Plan.select(torch.tensor([[True, False], [False, False]]))
    dropped = Seats(index, mask, 1, 5, (2, 1)).dropped(plan)
    assert dropped.tolist() == [[False, False, True, True, False]]


def test_images_of_the_latest_two_calls_are_remembered() -> None:
    """Whatever the capacity, and also where one has come before."""
    store, signal = SignalCache(lambda: torch.float32, capacity=1), ClsAttention(1)
    pictures = torch.rand(3, 1, 4, 8, generator=torch.Generator().manual_seed(0))

    def put(*numbers: int) -> None:
        features = torch.cat([pictures[number] for number in numbers])
        store.put(features, Signals({signal: torch.tensor(numbers)[:, None, None, None]}))

    def known() -> list[bool]:
        return [
            bool(store.get(feature_prints(picture).tolist(), picture.device))
            for picture in pictures
        ]

    put(0, 1)
    assert known() == [True, True, False]
    put(0)
    put(2)
    assert known() == [True, False, True]
