"""Passes of Video-LLaVA's two towers: whether pictures or videos are being encoded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import AttachError, UnsupportedError
from tokenprune.hooks import NotCopyable, Removable
from tokenprune.kept_patches import Origin
from tokenprune.signals import (
    Signals,
)

from ..kit.budget_rows import BudgetRows
from ..kit.method_wrapper import wrap_method
from .anatomy import Anatomy
from .names import Call, Signature


def shown_cls(parts: Anatomy) -> int:
    """[CLS] tokens that the language model sees of every frame."""
    return 1 if parts.select_strategy == "default" else 0


ENCODE = "get_video_features"
_FRAMES = "tokenprune_frames"
"""Attribute of encoded videos: how many frames each has."""


class Passes(NotCopyable):
    """Passes of the towers in every thread: which ran last, and which frames belong together.

    How many frames a video has reaches `get_video_features` and nothing below it, and `generate`
    calls that method from outside of any `forward`, so the one method is wrapped on the one
    instance.
    """

    def __init__(self, parts: Anatomy) -> None:
        self.parts = parts
        self.signature = Signature.of(getattr(parts.core, ENCODE))
        self._local = threading.local()

    def install(self) -> Iterator[Removable]:
        """Yield the handles."""
        pictures, videos = self.parts.towers
        yield pictures.register_forward_pre_hook(self._image)
        yield videos.register_forward_pre_hook(self._video)
        yield self.parts.core.register_forward_pre_hook(self._over)
        yield self.parts.core.register_forward_hook(self._over, always_call=True)
        yield from self.note_frames()

    def note_frames(self) -> Iterator[Removable]:
        """Yield the handle of what notes on encoded videos how many frames each has."""
        yield from wrap_method(self.parts.core, ENCODE, self._encode)

    def _image(self, tower: nn.Module, args: object) -> None:
        self._local.video = False

    def _video(self, tower: nn.Module, args: object) -> None:
        self._local.video = True

    def _over(self, core: nn.Module, *rest: object) -> None:
        self._local.pictures = False

    @property
    def video(self) -> bool:
        """Whether the latest pass of a tower was one over videos."""
        return getattr(self._local, "video", False)

    def counted_pictures(self) -> None:
        """Note that the pictures of a batch of prompts were reduced."""
        self._local.pictures = True

    @property
    def pictures(self) -> bool:
        """Whether the pictures of the same batch of prompts were reduced before."""
        return getattr(self._local, "pictures", False)

    def note(self, features: Tensor, known: Signals) -> None:
        """Take what is known of videos, until their [CLS] are back beside the patches."""
        self._local.known = known

    def noted(self) -> Signals | None:
        """What was taken last, once."""
        known: Signals | None = self._local.__dict__.pop("known", None)
        return known

    def _encode(self, call: Callable[[], Any], arguments: Mapping[str, Any]) -> Any:
        pixels = Call(self.signature, (), dict(arguments)).videos
        assert pixels is not None
        self._local.videos = tuple(pixels.shape[:2])
        try:
            output = call()
        finally:
            del self._local.videos
        if not isinstance(output, tuple):
            # `generate` hands this to `forward` in place of the pixels.
            setattr(output, _FRAMES, pixels.shape[1])
        return output

    def per_video(self) -> BudgetRows:
        """One row per video: the patches of its frames."""
        numbers = self._numbers()
        index, patches = numbers.flatten(1), self.parts.patches_per_crop
        origins = tuple(
            Origin(video, "video", patches_per_crop=patches) for video in range(len(numbers))
        )
        return BudgetRows(index, torch.ones_like(index, dtype=torch.bool), patches, origins)

    def per_frame(self) -> BudgetRows:
        """One row per frame."""
        numbers = self._numbers()
        videos, frames = numbers.shape[:2]
        origins = [Origin(v, "video", crop=frame) for v in range(videos) for frame in range(frames)]
        return BudgetRows(numbers.flatten(0, 1), None, self.parts.patches_per_crop, tuple(origins))

    def _numbers(self) -> Tensor:
        """`(videos, frames, patches)` int64: the patches that are being encoded, counted."""
        shape: tuple[int, int] | None = getattr(self._local, "videos", None)
        if shape is None:
            raise AttachError("the projector ran outside of the model's own get_video_features")
        videos, frames = shape
        numbers = torch.arange(videos * frames * self.parts.patches_per_crop, device="cpu")
        return numbers.reshape(videos, frames, -1)


def frames_of(pixels: Tensor | None, encoded: Any) -> int | None:
    """How many frames each video has, from its pixels or as it was encoded; None if unknown."""
    frames = getattr(encoded, _FRAMES, None) if pixels is None else pixels.shape[1]
    return None if frames is None else int(frames)


def unknown_frames() -> UnsupportedError:
    """Refusal of encoded videos that nobody noted."""
    return UnsupportedError(
        "it is not known how many frames the encoded videos have: they did not come from the "
        "attached model's own get_video_features; pass pixel_values_videos, or per='frame'"
    )
