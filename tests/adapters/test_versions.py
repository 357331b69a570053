"""The guard against a fault of transformers < 5.19, tried on hand-made calls in every version."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from support.llava import BOS, IMAGE, PATCHES, Row, collate, picture, prompts, pruned
from tokenprune import UnsupportedError
from tokenprune_adapters import versions

from .conftest import MakeLlava

A, B, C, D = (picture(number) for number in (1, 2, 3, 4))
CORE = SimpleNamespace(config=SimpleNamespace(image_token_id=IMAGE))


def two(first: Tensor = A, second: Tensor = B) -> Row:
    return Row([BOS, first, 5, second, 6])


def one(image: Tensor = A) -> Row:
    return Row([BOS, 7, image, 8])


TEXT = Row([BOS, 9, 10])


def call(rows: list[Row], images: list[Tensor], encoded: bool = False) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"input_ids": collate(rows)["input_ids"]}
    if encoded:
        features = [image.flatten()[: PATCHES * 4].reshape(PATCHES, 4) for image in images]
        return kwargs | {"mm_encoder_outputs": {"image": SimpleNamespace(pooler_output=features)}}
    return kwargs | {"pixel_values": torch.stack(images)}


MIXED_UP = {
    "two copies": ([two()] * 2, [A, A, B, B]),
    "three copies": ([two()] * 3, [A, A, A, B, B, B]),
    "a ragged batch": (
        [one(C)] * 3 + [two()] * 3 + [TEXT] * 3,
        [C, C, C, A, A, A, B, B, B],
    ),
    "equal prompts about other images": (
        [two(), two(), two(C, D), two(C, D)],
        [A, A, B, B, C, C, D, D],
    ),
}
FINE = {
    "copies in order": ([two()] * 3, [A, B, A, B, A, B]),
    "one image each": ([one()] * 3, [A, A, A]),
    "a ragged batch in order": ([one(C)] * 2 + [two()] * 2 + [TEXT] * 2, [C, C, A, B, A, B]),
    "not expanded": ([two(), one(C), TEXT], [A, B, C]),
    "equal prompts, not expanded": ([two(), two(C, D)], [A, B, C, D]),
    "equal prompts in order": (
        [two(), two(), two(C, D), two(C, D)],
        [A, B, A, B, C, D, C, D],
    ),
    "the same image twice": ([two(A, A)] * 2, [A, A, A, A]),
    "a single row": ([two()], [A, B]),
    "more images than placeholders": ([TEXT, TEXT], [A, B]),
}


@pytest.mark.parametrize("encoded", [False, True], ids=["pixels", "encoded"])
@pytest.mark.parametrize("name", MIXED_UP)
def test_mixed_up_images_are_refused(name: str, encoded: bool) -> None:
    with pytest.raises(UnsupportedError, match=r"mixes up the images.*install transformers>=5\.19"):
        versions._refuse_expanded_images(CORE, (), call(*MIXED_UP[name], encoded))


@pytest.mark.parametrize("encoded", [False, True], ids=["pixels", "encoded"])
@pytest.mark.parametrize("name", FINE)
def test_images_in_order_are_not(name: str, encoded: bool) -> None:
    versions._refuse_expanded_images(CORE, (), call(*FINE[name], encoded))


def test_calls_without_ids_or_images_are_not() -> None:
    versions._refuse_expanded_images(CORE, (), {"inputs_embeds": torch.zeros(2, 3, 4)})
    versions._refuse_expanded_images(CORE, (), {"input_ids": torch.zeros(2, 3).long()})


@pytest.mark.skipif(versions.VERSION >= (5, 19), reason="transformers has mended it")
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}],
    ids=["beams", "sampling"],
)
@pytest.mark.parametrize("rows", [slice(None), slice(1, 2)], ids=["batch", "alone"])
def test_below_5_19_several_images_cannot_be_expanded(
    llava: MakeLlava, options: dict[str, Any], rows: slice
) -> None:
    with pytest.raises(UnsupportedError, match="mixes up the images"):
        pruned(llava(), collate(prompts()[rows]), 4, **options)


@pytest.mark.parametrize(
    ("version", "supported"),
    [((5, 3), False), ((5, 4), True), ((5, 99), True), ((6, 0), False), ((4, 57), False)],
)
def test_the_supported_range(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], supported: bool
) -> None:
    monkeypatch.setattr(versions, "VERSION", version)
    if supported:
        versions.check_transformers()
        return
    with pytest.raises(UnsupportedError, match=r"not supported; install transformers>=5\.4,<6"):
        versions.check_transformers()


@pytest.mark.parametrize(("version", "hooks"), [((5, 18), 1), ((5, 19), 0), ((5, 23), 0)])
def test_the_guard_is_for_old_versions_only(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], hooks: int
) -> None:
    monkeypatch.setattr(versions, "VERSION", version)
    handles = list(versions.expanded_images_guard(torch.nn.Linear(1, 1)))
    assert len(handles) == hooks
