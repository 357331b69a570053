"""Video-LLaVA of transformers (`VideoLlavaForConditionalGeneration`): pictures and videos."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.adapter import ModelAdapter, NotCopyable, Observation, Removable
from tokenprune.budget import Budgeted, Per
from tokenprune.errors import AttachError, UnsupportedError
from tokenprune.placement import BeforeLLM, Placement
from tokenprune.report import Record
from tokenprune.signals import ClsAttention, Signal
from tokenprune.strategy import Stage, Strategy

from ..carry import carried, carry
from ..llms.shorten import ShortenPrompts, check_llm
from ..marks import marked
from ..projection import ReduceBeforeProjector
from ..rowing import Rows
from ..versions import check_transformers, lost_images_guard
from .parts import feature_layer, tower_adapter
from .placed import before_llm


class VideoLlavaAdapter(ModelAdapter):
    """Reduces pictures and videos before the projector.

    With ``per="image"`` (the default) a budget counts patches of a picture or of a whole video,
    with ``per="frame"`` those of every frame (FasterVLM's branch for videos), a picture being a
    frame of its own. The [CLS] token that this model shows of every frame is no patch: kept, never
    counted.
    """

    def provides(self, model: nn.Module, placement: Placement) -> frozenset[type[Signal]]:
        if not isinstance(placement, BeforeLLM):
            raise UnsupportedError(
                f"{type(model).__name__} does not offer {placement!r}; it offers 'before-llm'"
            )
        # Below 5.19 transformers mixes up the videos of expanded prompts, see versions.py.
        check_transformers(oldest=(5, 19))
        core: Any = model.model
        check_llm(core.language_model)
        # The two towers are made from one config.
        provided = tower_adapter(core.video_tower).provides(core.video_tower)
        _check_select_strategy(core, has_cls=ClsAttention in provided)
        return provided

    def install(
        self, model: nn.Module, stages: tuple[Stage, ...], record: Record
    ) -> Iterator[Removable]:
        core: Any = model.model
        stage = before_llm(stages)
        assert stage is not None
        assert isinstance(stage.placement, BeforeLLM)
        observation = Observation()
        for tower in (core.image_tower, core.video_tower):
            yield from tower_adapter(tower).install(
                tower, stage.strategy.signals, observation, feature_layer(core.config)
            )
        passes = _Passes(core)
        yield from passes.install(per_video=_per(stage) == "image")
        reduce = _ReduceBoth(core, stage.strategy, _per(stage), observation, record, passes)
        yield from reduce.install()
        yield core.register_forward_hook(_hide_marks)
        yield from ShortenPrompts(stage.placement.positions, record).install(core.language_model)
        yield from lost_images_guard(core)


def _check_select_strategy(core: Any, has_cls: bool) -> None:
    """The projector must get all patches of a picture, and patches alone."""
    strategy, supported = core.config.vision_feature_select_strategy, "default"
    does = "shows [CLS] of pictures among the patches"
    if not has_cls:
        does, supported = f"drops the first patch of a {type(core.image_tower).__name__}", "full"
    if strategy != supported:
        raise UnsupportedError(
            f"vision_feature_select_strategy={strategy!r} {does}; only {supported!r} is supported"
        )


def _per(stage: Stage) -> Per:
    """What the budgets of `stage` are for: to this model, a frame is a crop."""
    found: set[Per] = set()
    for step in stage.strategy.steps:
        if isinstance(step, Budgeted):
            found.add("frame" if step.per == "crop" else step.per)
    if len(found) > 1:
        raise UnsupportedError(f"steps of one stage must share per, got {sorted(found)}")
    return found.pop() if found else "image"


def _hide_marks(core: nn.Module, args: object, output: Any) -> None:
    """Callers see the features that entered the language model, without marks."""
    for name in ("image_hidden_states", "video_hidden_states"):
        features = getattr(output, name, None)
        if features is not None:
            setattr(output, name, features[~marked(features)])


class _Passes(NotCopyable):
    """Knows, for every thread, which tower ran last and how the frames of videos belong together.

    How many frames a video has reaches `get_video_features` and nothing below it, and `generate`
    calls that method from outside of any `forward`, so where the number matters the one method is
    wrapped on the one instance.
    """

    def __init__(self, core: Any) -> None:
        self.core = core
        self._local = threading.local()

    def install(self, per_video: bool) -> Iterator[Removable]:
        """Yield the handles."""
        yield self.core.image_tower.register_forward_pre_hook(self._image)
        yield self.core.video_tower.register_forward_pre_hook(self._video)
        yield self.core.register_forward_pre_hook(self._over)
        yield self.core.register_forward_hook(self._over, always_call=True)
        if per_video:
            yield from self._wrap("get_video_features")

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

    def _wrap(self, name: str) -> Iterator[Removable]:
        if name in vars(self.core):
            raise AttachError(f"somebody else has replaced {type(self.core).__name__}.{name}")
        original = getattr(self.core, name)
        signature = inspect.signature(original)

        # `generate` chooses arguments by the signature, which `wraps` hands on.
        @functools.wraps(original)
        def encode(*args: Any, **kwargs: Any) -> Any:
            pixels = signature.bind(*args, **kwargs).arguments["pixel_values_videos"]
            self._local.videos = tuple(pixels.shape[:2])
            try:
                return original(*args, **kwargs)
            finally:
                del self._local.videos

        setattr(self.core, name, encode)
        yield _Attribute(self.core, name)

    def per_video(self) -> Rows:
        """One row per video: the patches of its frames."""
        shape: tuple[int, int] | None = getattr(self._local, "videos", None)
        if shape is None:
            raise AttachError("the projector ran outside of the model's own get_video_features")
        videos, frames = shape
        vision = self.core.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        index = torch.arange(videos * frames * patches).reshape(videos, frames * patches)
        return Rows(index, torch.ones_like(index, dtype=torch.bool), patches)


@dataclass(frozen=True)
class _Attribute:
    """An instance attribute that was set."""

    owner: Any
    name: str

    def remove(self) -> None:
        """Show what the class says again."""
        vars(self.owner).pop(self.name, None)


class _ReduceBoth(NotCopyable):
    """The hooks on the projector, which pictures and videos share.

    Of every frame the projector also gets [CLS], which goes around the reduction.
    """

    def __init__(
        self,
        core: Any,
        strategy: Strategy,
        per: Per,
        observation: Observation,
        record: Record,
        passes: _Passes,
    ) -> None:
        self.core = core
        self.record = record
        self.passes = passes
        self.cls = 1 if core.config.vision_feature_select_strategy == "default" else 0
        arrange = passes.per_video if per == "image" else None
        self.pictures = ReduceBeforeProjector(strategy, observation, record)
        self.videos = ReduceBeforeProjector(strategy, observation, record, arrange=arrange)

    def install(self) -> Iterator[Removable]:
        """Yield the handles."""
        projector = self.core.multi_modal_projector
        yield projector.register_forward_pre_hook(self.before)
        yield projector.register_forward_hook(self.after)

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
        if beside.shape is None:
            self.videos.after(projector, (carry(args[0], beside.left),), output[:, self.cls :])
            return None
        rows, kept, _ = beside.shape
        frames = output.shape[1] - rows * kept
        cls, short = output[0, :frames], output[0, frames:].reshape(rows, kept, -1)
        patches = self.videos.after(projector, (carry(args[0], beside.left),), short)
        assert patches is not None
        cls = cls.reshape(patches.shape[0], self.cls, patches.shape[2])
        return torch.cat([cls, patches], dim=1)


@dataclass(frozen=True, eq=False)
class _Beside:
    """What the hook before the projector leaves for the one after it, of frames.

    Attributes:
        left: what reducing the patches has left.
        shape: of the kept patches, which come after all [CLS]; None: frames as they were.
    """

    left: object
    shape: tuple[int, ...] | None
