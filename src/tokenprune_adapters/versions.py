"""What is refused in older versions of transformers, in words instead of wrong answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tokenprune.adapter import Removable
from tokenprune.errors import UnsupportedError

from .fingerprint import fingerprint
from .llms.cache import state_of

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])


def check_transformers(oldest: tuple[int, int] = (5, 4)) -> None:
    """Refuse versions whose caches and masks work differently."""
    if not oldest <= VERSION < (6, 0):
        wanted = ".".join(map(str, oldest))
        raise UnsupportedError(
            f"transformers {transformers.__version__} is not supported; install "
            f"transformers>={wanted},<6"
        )


def expanded_images_guard(core: nn.Module) -> Iterator[Removable]:
    """Below 5.19: refuse beams or several returned sequences with several images in a prompt.

    Those versions repeat the images of a batch one by one, so that the copies of a prompt with
    images A and B get A, A and B, B: wrong without any error, with and without tokenprune.
    """
    if VERSION < (5, 19):
        yield core.register_forward_pre_hook(_refuse_expanded_images, with_kwargs=True)


def _refuse_expanded_images(core: Any, args: object, kwargs: dict[str, Any]) -> None:
    ids, images = kwargs.get("input_ids"), _images(kwargs)
    if ids is None or images is None or ids.shape[0] < 2:
        return
    prints = fingerprint(images).tolist()
    placeholders = (ids == core.config.image_token_id).sum(1).tolist()
    per_image = sum(placeholders) // len(prints)
    if per_image == 0:
        return  # too many images: the model itself complains
    same_as_next = (ids[1:] == ids[:-1]).all(1).tolist()
    first = 0
    for row, same in enumerate([*same_as_next, False]):
        if same:
            continue
        of_each = placeholders[row] // per_image
        group = prints[: (row + 1 - first) * of_each]
        prints, first = prints[len(group) :], row + 1
        if of_each > 1 and _mixed_up(group, of_each):
            raise UnsupportedError(
                f"transformers {transformers.__version__} mixes up the images of a prompt with "
                "several when it expands a batch for beams or num_return_sequences; install "
                "transformers>=5.19"
            )


def _mixed_up(prints: list[int], of_each: int) -> bool:
    """Whether equal prompts with `of_each` images got every image several times in a row.

    >>> _mixed_up([1, 1, 1, 2, 2, 2], of_each=2), _mixed_up([1, 2, 1, 2, 1, 2], of_each=2)
    (True, False)
    """
    rows = len(prints) // of_each
    for copies in (number for number in range(2, rows + 1) if rows % number == 0):
        one_by_one = [image for image in prints[::copies] for _ in range(copies)]
        sources = range(0, len(prints), copies * of_each)
        by_prompt = [
            image
            for start in sources
            for _ in range(copies)
            for image in prints[start : start + copies * of_each : copies]
        ]
        if prints == one_by_one != by_prompt:
            return True
    return False


_PIXELS = {
    "image": ("pixel_values", "pixel_values_images"),
    "video": ("pixel_values_videos",),
}
"""Names of what comes with the placeholders of images and of videos."""


def lost_images_guard(core: nn.Module) -> Iterator[Removable]:
    """Below 5.23: refuse chunked prefill of a prompt with images or videos.

    Those versions leave them out when they split a prompt, without any error, with and
    without tokenprune.
    """
    if VERSION < (5, 23):
        yield core.register_forward_pre_hook(_refuse_lost_images, with_kwargs=True)


def _refuse_lost_images(core: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    ids = args[0] if args else kwargs.get("input_ids")
    cache = kwargs.get("past_key_values")
    # What follows a shortened prompt may be guesses of prompt lookup, placeholders included.
    if ids is None or ids.shape[1] < 2 or cache is None or state_of(cache) is not None:
        return
    encoded = kwargs.get("mm_encoder_outputs") or {}
    for kind, pixels in _PIXELS.items():
        token = getattr(core.config, f"{kind}_token_id", None)
        given = encoded.get(kind) is not None or any(kwargs.get(n) is not None for n in pixels)
        if token is not None and not given and bool((ids == token).any()):
            raise UnsupportedError(
                f"placeholders came without their {kind}s: transformers "
                f"{transformers.__version__} loses the {kind}s of a prompt that is prefilled in "
                "chunks; unset prefill_chunk_size, or install transformers>=5.23"
            )


def _images(kwargs: dict[str, Any]) -> Tensor | None:
    encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
    if encoded is not None:
        return torch.stack(list(encoded.pooler_output))
    pixels: Tensor | None = kwargs.get("pixel_values")
    return pixels
