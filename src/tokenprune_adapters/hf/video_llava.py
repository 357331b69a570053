"""Video-LLaVA of transformers (`VideoLlavaForConditionalGeneration`): pictures and videos."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tokenprune.adapter import ModelAdapter
from tokenprune.budget import Budgeted, Per
from tokenprune.errors import UnsupportedError
from tokenprune.hooks import Removable
from tokenprune.kept_patches import Origin
from tokenprune.observation import Attended, Observation
from tokenprune.placement import BeforeLLM, Placement
from tokenprune.report import Record
from tokenprune.signals import (
    ClsAttention,
    Signal,
)
from tokenprune.strategy import Stage

from .anatomy import Anatomy
from .checks import Encoders, check_model
from .chunked_prefill import lost_images_guard
from .llava_parts import check_select_strategy, same_layers, tower_adapter
from .llm.image_slots import Images
from .llm.signal_cache import SignalCache
from .names import Call
from .stage_hooks import FindImages, Placed, check_placement, readable
from .video_passes import ENCODE, Passes, frames_of, shown_cls, unknown_frames
from .video_projector import ReducePicturesAndVideos
from .watch_attention import WatchAttention

_ENCODERS: Encoders = {"get_image_features": (Call.pixels,), ENCODE: (Call.videos,)}


class VideoLlavaAdapter(ModelAdapter):
    """Adapter of Video-LLaVA: reduces pictures and videos, before the projector or after layers.

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
        passes = Passes(parts)
        if placed.before is not None or placed.inside:
            yield from same_layers(parts, _ENCODERS)
            observation = Observation()
            for tower in parts.towers:
                yield from tower_adapter(tower).install(
                    tower, placed.of_tower, observation, parts.feature_layer
                )
            yield from passes.install()
            later = store.put if placed.inside else None
            reduce = ReducePicturesAndVideos(
                parts, placed.strategy, per, observation, record, passes, later
            )
            yield from reduce.install()
        find = FindImages(parts.core, _FindVisual(parts, per).images)
        yield from placed.install(parts, find, store, record)
        yield from lost_images_guard(parts)

    def watch(self, model: nn.Module, attended: Attended) -> Iterator[Removable]:
        self.provides(model, BeforeLLM())
        parts = Anatomy.of(model)
        yield from Passes(parts).note_frames()
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


class _FindVisual:
    """Finder of pictures, videos and frames in prompts, by their placeholders.

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
        frames = frames_of(pixels, encoded.get("video"))
        if frames is None:
            if self.per == "image" and encoded.get("video") is not None:
                raise unknown_frames()
            frames = 1
        shared = frames if self.per == "image" else 1  # frames that share a budget
        patches = torch.arange(self.parts.patches_per_crop, device="cpu")
        cls = patches.new_full((shown_cls(self.parts),), -1)
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
