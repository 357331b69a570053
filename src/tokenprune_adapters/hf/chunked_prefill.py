"""Guard against chunked prefill below transformers 5.23, which loses the pictures of a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import transformers
from torch import nn

from tokenprune.errors import UnsupportedError
from tokenprune.hooks import NotCopyable, Removable

from .anatomy import Anatomy
from .checks import VERSION
from .llm.kv_cache import state_of
from .names import calls_of

_KINDS: tuple[Literal["image", "video"], ...] = ("image", "video")


def lost_images_guard(parts: Anatomy) -> Iterator[Removable]:
    """Below 5.23: refuse chunked prefill of a prompt with images or videos.

    Those versions leave them out when they split a prompt, without any error, with and
    without tokenprune.
    """
    if VERSION < (5, 23):
        hook = RefuseLostImages(parts)
        yield parts.core.register_forward_pre_hook(hook.before, with_kwargs=True)


class RefuseLostImages(NotCopyable):
    """Hook before a model without its LM head."""

    def __init__(self, parts: Anatomy) -> None:
        self.parts = parts
        self.calls = calls_of(parts.core)

    def before(self, core: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self.calls(args, kwargs)
        ids, cache = call.ids, call.cache
        # What follows a shortened prompt may be guesses of prompt lookup, placeholders included.
        if ids is None or ids.shape[1] < 2 or cache is None or state_of(cache) is not None:
            return
        encoded = call.encoded or {}
        pixels = {"image": call.pixels, "video": call.videos}
        for kind in _KINDS:
            given = encoded.get(kind) is not None or pixels[kind] is not None
            if not given and bool(self.parts.placeholders(ids, kind).any()):
                raise UnsupportedError(
                    f"placeholders came without their {kind}s: transformers "
                    f"{transformers.__version__} loses the {kind}s of a prompt that is prefilled "
                    "in chunks; unset prefill_chunk_size, or install transformers>=5.23"
                )
