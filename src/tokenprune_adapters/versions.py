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


def check_transformers() -> None:
    """Refuse versions whose caches and masks work differently."""
    if not (5, 4) <= VERSION < (6, 0):
        raise UnsupportedError(
            f"transformers {transformers.__version__} is not supported; install "
            "transformers>=5.4,<6"
        )


def expanded_images_guard(core: nn.Module) -> Iterator[Removable]:
    """Below 5.19: refuse beams or several returned sequences with several images in a prompt.

    Those versions repeat the images of a batch one by one, so that the copies of a prompt with
    images A and B get A, A and B, B: wrong without any error, with and without tokenprune.
    """
    if VERSION < (5, 19):
        yield core.register_forward_pre_hook(_refuse_expanded_images, with_kwargs=True)


def _refuse_expanded_images(core: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
    ids, images = kwargs.get("input_ids"), _images(kwargs)
    if ids is None or images is None or ids.shape[0] < 2 or images.shape[0] % ids.shape[0]:
        return
    prints = fingerprint(images).reshape(ids.shape[0], -1)
    if prints.shape[1] < 2:
        return
    prints = prints.to(ids.device)
    twin_prompts = (ids[1:] == ids[:-1]).all(1)
    repeated = (prints == prints[:, :1]).all(1)
    other_images = prints[1:, 0] != prints[:-1, 0]
    if bool((twin_prompts & repeated[1:] & repeated[:-1] & other_images).any()):
        raise UnsupportedError(
            f"transformers {transformers.__version__} mixes up the images of a prompt with several "
            "when it expands a batch for beams or num_return_sequences; install "
            "transformers>=5.19"
        )


def lost_images_guard(core: nn.Module) -> Iterator[Removable]:
    """Below 5.23: refuse chunked prefill of a prompt with images.

    Those versions leave the images out when they split a prompt, without any error, with and
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
    if _images(kwargs) is None and bool((ids == core.config.image_token_id).any()):
        raise UnsupportedError(
            f"placeholders came without their images: transformers {transformers.__version__} "
            "loses the images of a prompt that is prefilled in chunks; unset prefill_chunk_size, "
            "or install transformers>=5.23"
        )


def _images(kwargs: dict[str, Any]) -> Tensor | None:
    encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
    if encoded is not None:
        return torch.stack(list(encoded.pooler_output))
    pixels: Tensor | None = kwargs.get("pixel_values")
    return pixels
