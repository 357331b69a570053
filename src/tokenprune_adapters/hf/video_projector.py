"""Reduction before the one projector of Video-LLaVA, through which pictures and videos pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.budget import Per
from tokenprune.hooks import NotCopyable, Removable
from tokenprune.observation import Observation
from tokenprune.report import Record
from tokenprune.signals import (
    Signals,
)
from tokenprune.strategy import Strategy

from ..kit.before_projector import Ids, ReduceBeforeProjector
from ..kit.carry import carried, carry
from .anatomy import Anatomy
from .video_passes import Passes, shown_cls


class ReducePicturesAndVideos(NotCopyable):
    """Pair of hooks on the projector, which pictures and videos share.

    Of every frame the projector also gets [CLS], which goes around the reduction.
    """

    def __init__(
        self,
        parts: Anatomy,
        strategy: Strategy | None,
        per: Per,
        observation: Observation,
        record: Record,
        passes: Passes,
        later: Callable[[Tensor, Signals], None] | None,
    ) -> None:
        self.projector = parts.projector
        self.record = record
        self.passes = passes
        self.cls = shown_cls(parts)
        self.later = later
        arrange = passes.per_video if per == "image" else passes.per_frame
        self.pictures = ReduceBeforeProjector(strategy, observation, record, later)
        note = None if later is None else passes.note
        self.videos = ReduceBeforeProjector(strategy, observation, record, note, arrange)

    def install(self) -> Iterator[Removable]:
        """Yield the handles."""
        yield self.projector.register_forward_pre_hook(self.before)
        yield self.projector.register_forward_hook(self.after)

    def before(self, projector: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.passes.video:
            made = self.pictures.before(projector, args)
            self.passes.counted_pictures()
            return made
        features: Tensor = args[0]
        patches = features[:, self.cls :]
        with self.record.same_call() if self.passes.pictures else nullcontext():
            made = self.videos.before(projector, (patches, *args[1:]))
        if made is None:
            return None
        kept: Tensor = made[0]
        if kept.shape == patches.shape and kept.data_ptr() == patches.data_ptr():
            # Nothing was taken: to the bit, the projector does what it always does.
            return (carry(features, _Beside(carried(kept), None)), *args[1:])
        # One row of all tokens, [CLS] first: the projector does not care which is whose.
        whole = torch.cat([features[:, : self.cls].flatten(0, 1), kept.flatten(0, 1)])[None]
        return (carry(whole, _Beside(carried(kept), tuple(kept.shape))), *args[1:])

    def after(self, projector: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        beside = carried(args[0])
        if not isinstance(beside, _Beside):
            return self.pictures.after(projector, args, output)
        left = (carry(args[0], beside.left),)
        if beside.shape is None:
            self.videos.after(projector, left, output[:, self.cls :])
            self._remember(output)
            return None
        rows, kept, _ = beside.shape
        frames = output.shape[1] - rows * kept
        cls, short = output[0, :frames], output[0, frames:].reshape(rows, kept, -1)
        patches = self.videos.after(projector, left, short)
        assert patches is not None
        cls = cls.reshape(patches.shape[0], self.cls, patches.shape[2])
        features = torch.cat([cls, patches], dim=1)
        self._remember(features)
        return features

    def _remember(self, features: Tensor) -> None:
        """Leave what is known of `(frames, slots, channels)` for stages inside the LLM."""
        known = self.passes.noted()
        if self.later is not None and known is not None:
            rows = known[Ids()].shape[0]
            self.later(features.reshape(rows, -1, features.shape[2]), known)


@dataclass(frozen=True, eq=False)
class _Beside:
    """Frames that the hook before the projector leaves for the one after it.

    Attributes:
        left: what reducing the patches has left.
        shape: number of images and tokens of the kept patches, which come after all [CLS]; None:
            frames as they were.
    """

    left: object
    shape: tuple[int, ...] | None
