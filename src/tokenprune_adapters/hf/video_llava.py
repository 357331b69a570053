"""Video-LLaVA of transformers (`VideoLlavaForConditionalGeneration`): pictures and videos."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.adapter import ModelAdapter
from tokenprune.budget import Budgeted, Per
from tokenprune.errors import AttachError, UnsupportedError
from tokenprune.hooks import NotCopyable, Removable
from tokenprune.kept_patches import Origin
from tokenprune.observation import Attended, Observation
from tokenprune.placement import BeforeLLM, Placement
from tokenprune.report import Record
from tokenprune.signals import (
    ClsAttention,
    Signal,
    Signals,
)
from tokenprune.strategy import Stage, Strategy

from ..kit.before_projector import Ids, ReduceBeforeProjector
from ..kit.budget_rows import BudgetRows
from ..kit.carry import carried, carry
from ..kit.method_wrapper import wrap_method
from .anatomy import Anatomy
from .checks import Encoders, check_model
from .chunked_prefill import lost_images_guard
from .llava_parts import check_select_strategy, same_layers, tower_adapter
from .llm.image_slots import Images
from .llm.signal_cache import SignalCache
from .names import Call, Signature
from .stage_hooks import FindImages, Placed, check_placement, readable
from .watch_attention import WatchAttention

_ENCODE = "get_video_features"
_ENCODERS: Encoders = {"get_image_features": (Call.pixels,), _ENCODE: (Call.videos,)}


class VideoLlavaAdapter(ModelAdapter):
    """Reduces pictures and videos before the projector, after decoder layers, or both.

    With ``per="image"`` (the default) a budget counts patches of a picture or of a whole video,
    with ``per="frame"`` those of every frame (FasterVLM's branch for videos), a picture being a
    frame of its own. The [CLS] token that this model shows of every frame is no patch: kept, never
    counted.
    """

    def provides(self, model: nn.Module, placement: Placement) -> frozenset[type[Signal]]:
        check_placement(model, placement)
        parts = Anatomy.of(model)
        check_model(parts, placement, _ENCODERS)
        # The two towers are made from one config.
        tower = parts.towers[0]
        provided = tower_adapter(tower).provides(tower)
        check_select_strategy(parts, has_cls=ClsAttention in provided)
        return readable(placement, provided)

    def install(
        self, model: nn.Module, stages: tuple[Stage, ...], record: Record
    ) -> Iterator[Removable]:
        parts = Anatomy.of(model)
        per = _per(stages)
        placed = Placed.of(stages, parts.llm)
        store = SignalCache(parts.core.get_input_embeddings().weight.dtype)
        passes = _Passes(parts)
        if placed.before is not None or placed.inside:
            yield from same_layers(parts, _ENCODERS)
            observation = Observation()
            for tower in parts.towers:
                yield from tower_adapter(tower).install(
                    tower, placed.of_tower, observation, parts.feature_layer
                )
            yield from passes.install()
            later = store.put if placed.inside else None
            reduce = _ReduceBoth(parts, placed.strategy, per, observation, record, passes, later)
            yield from reduce.install()
        find = FindImages(parts.core, _FindVisual(parts, per).images)
        yield from placed.install(parts, find, store, record)
        yield from lost_images_guard(parts)

    def watch(self, model: nn.Module, attended: Attended) -> Iterator[Removable]:
        self.provides(model, BeforeLLM())
        parts = Anatomy.of(model)
        yield from _Passes(parts).note_frames()
        find = FindImages(parts.core, _FindVisual(parts, "image").images)
        yield from WatchAttention(parts, find, attended).install()
        yield from lost_images_guard(parts)


def _per(stages: tuple[Stage, ...]) -> Per:
    """What the budgets of `stages` are for: to this model, a frame is a crop."""
    found: set[Per] = set()
    for step in (step for stage in stages for step in stage.strategy.steps):
        if isinstance(step, Budgeted):
            found.add("frame" if step.per == "crop" else step.per)
    if len(found) > 1:
        raise UnsupportedError(f"steps of all stages must share per, got {sorted(found)}")
    return found.pop() if found else "image"


def _shown_cls(parts: Anatomy) -> int:
    """[CLS] tokens that the language model sees of every frame."""
    return 1 if parts.select_strategy == "default" else 0


_FRAMES = "tokenprune_frames"
"""Attribute of encoded videos: how many frames each has."""


class _Passes(NotCopyable):
    """Knows, for every thread, which tower ran last and how the frames of videos belong together.

    How many frames a video has reaches `get_video_features` and nothing below it, and `generate`
    calls that method from outside of any `forward`, so the one method is wrapped on the one
    instance.
    """

    def __init__(self, parts: Anatomy) -> None:
        self.parts = parts
        self.signature = Signature.of(getattr(parts.core, _ENCODE))
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
        yield from wrap_method(self.parts.core, _ENCODE, self._encode)

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


class _FindVisual:
    """Finds pictures, videos and frames in prompts by their placeholders.

    Args:
        parts: the parts of the model.
        per: what a budget is for: ``"image"`` or ``"frame"``.
    """

    def __init__(self, parts: Anatomy, per: Per) -> None:
        self.parts = parts
        self.per = per

    def images(self, ids: Tensor, call: Call) -> Images:
        """Whatever shares a budget in a batch of prompts, in order."""
        encoded = call.encoded or {}
        pixels = call.videos
        given = pixels is not None or encoded.get("video") is not None
        video = self.parts.placeholders(ids, "video") & given
        given = call.pictures is not None or encoded.get("image") is not None
        picture = self.parts.placeholders(ids, "image") & given
        placeholders = picture | video
        frames = _frames(pixels, encoded.get("video"))
        if frames is None:
            if self.per == "image" and encoded.get("video") is not None:
                raise _unknown_frames()
            frames = 1
        shared = frames if self.per == "image" else 1  # frames that share a budget
        patches = torch.arange(self.parts.patches_per_crop, device="cpu")
        cls = patches.new_full((_shown_cls(self.parts),), -1)
        each = [torch.cat([cls, patches + frame * len(patches)]) for frame in range(shared)]
        found, origins = [], []
        of_video = video[placeholders].tolist()
        start = seen = 0
        while start < len(of_video):
            if of_video[start]:
                found.append(torch.cat(each))
                number, frame = divmod(seen, frames)
                whole = len(patches) if self.per == "image" else None
                origins.append(Origin(number, "video", frame, whole))
                seen += shared
            else:
                found.append(patches)
                origins.append(Origin(len(origins) - seen // shared))
            start += len(found[-1])
        if not found:
            return Images.alike(placeholders, 0, len(patches))
        return Images.of(placeholders, found, origins)


def _frames(pixels: Tensor | None, encoded: Any) -> int | None:
    """How many frames each video has, from its pixels or as it was encoded; None if unknown."""
    frames = getattr(encoded, _FRAMES, None) if pixels is None else pixels.shape[1]
    return None if frames is None else int(frames)


def _unknown_frames() -> UnsupportedError:
    return UnsupportedError(
        "it is not known how many frames the encoded videos have: they did not come from the "
        "attached model's own get_video_features; pass pixel_values_videos, or per='frame'"
    )


class _ReduceBoth(NotCopyable):
    """The hooks on the projector, which pictures and videos share.

    Of every frame the projector also gets [CLS], which goes around the reduction.
    """

    def __init__(
        self,
        parts: Anatomy,
        strategy: Strategy | None,
        per: Per,
        observation: Observation,
        record: Record,
        passes: _Passes,
        later: Callable[[Tensor, Signals], None] | None,
    ) -> None:
        self.projector = parts.projector
        self.record = record
        self.passes = passes
        self.cls = _shown_cls(parts)
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
    """What the hook before the projector leaves for the one after it, of frames.

    Attributes:
        left: what reducing the patches has left.
        shape: of the kept patches, which come after all [CLS]; None: frames as they were.
    """

    left: object
    shape: tuple[int, ...] | None
