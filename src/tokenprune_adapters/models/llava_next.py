"""LLaVA-NeXT of transformers (`LlavaNextForConditionalGeneration`): any-resolution images."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.adapter import ModelAdapter, NotCopyable, Observation, Removable
from tokenprune.budget import Budgeted, Per
from tokenprune.errors import AttachError, UnsupportedError
from tokenprune.placement import BeforeLLM, Newline, Placement
from tokenprune.report import Record
from tokenprune.signals import ClsAttention, Signal
from tokenprune.strategy import Stage

from ..anyres import NEWLINE, Packing
from ..llms.shorten import ShortenPrompts, check_llm
from ..projection import ReduceBeforeProjector
from ..rowing import Rows
from ..versions import check_transformers
from .parts import (
    check_budgets,
    check_select_strategy,
    feature_layer,
    hide_marks,
    tower_adapter,
)
from .placed import before_llm


class LlavaNextAdapter(ModelAdapter):
    """Reduces before the projector; grid, unpadding and newlines stay the model's own.

    With ``per="image"`` (the default) a budget counts patches of an image over its base view and
    all tiles, with ``per="crop"`` those of every crop (FasterVLM). Patches that unpadding cuts away
    are not there to be kept. Newline tokens are text: kept and never counted, unless the
    placement says ``newline="drop"``.
    """

    def provides(self, model: nn.Module, placement: Placement) -> frozenset[type[Signal]]:
        if not isinstance(placement, BeforeLLM):
            raise UnsupportedError(
                f"{type(model).__name__} does not offer {placement!r}; it offers 'before-llm'"
            )
        # Below 5.19 transformers mixes up the images of expanded prompts, see versions.py.
        check_transformers(oldest=(5, 19))
        core: Any = model.model
        check_llm(core.language_model)
        provided = tower_adapter(core.vision_tower).provides(core.vision_tower)
        check_select_strategy(core, has_cls=ClsAttention in provided)
        return provided

    def install(
        self, model: nn.Module, stages: tuple[Stage, ...], record: Record
    ) -> Iterator[Removable]:
        core: Any = model.model
        check_budgets(stages)
        stage = before_llm(stages)
        assert stage is not None
        assert isinstance(stage.placement, BeforeLLM)
        observation = Observation()
        tower = core.vision_tower
        yield from tower_adapter(tower).install(
            tower, stage.strategy.signals, observation, feature_layer(core.config)
        )
        pack = _PackImages(_per(stage), stage.placement.newline)
        yield from pack.install(core)
        reduce = ReduceBeforeProjector(stage.strategy, observation, record, arrange=pack.rows)
        yield from reduce.install(core.multi_modal_projector)
        yield core.register_forward_hook(hide_marks)
        yield from ShortenPrompts(stage.placement.positions, record).install(core.language_model)


def _per(stage: Stage) -> Per:
    found = {step.per for step in stage.strategy.steps if isinstance(step, Budgeted)}
    if len(found) > 1:
        raise UnsupportedError(f"steps of one stage must share per, got {sorted(found)}")
    return found.pop() if found else "image"


class _PackImages(NotCopyable):
    """Knows, while a model encodes images, how their crops will be packed.

    The sizes of the images reach `get_image_features` and nothing below it, and `generate` calls
    that method from outside of any `forward`, so the one method is wrapped on the one instance.
    """

    def __init__(self, per: Per, newline: Newline) -> None:
        self.per = per
        self.newline = newline
        self._local = threading.local()

    def install(self, core: Any) -> Iterator[Removable]:
        """Yield the handle."""
        name = "get_image_features"
        if name in vars(core):
            raise AttachError(f"somebody else has replaced {type(core).__name__}.{name}")
        original = getattr(core, name)
        signature = inspect.signature(original)

        # `generate` chooses arguments by the signature, which `wraps` hands on.
        @functools.wraps(original)
        def encode(*args: Any, **kwargs: Any) -> Any:
            sizes = signature.bind(*args, **kwargs).arguments["image_sizes"]
            vision = core.config.vision_config
            patches = (vision.image_size // vision.patch_size) ** 2
            packing = Packing.of(core, torch.as_tensor(sizes).cpu(), patches)
            self._local.packing = packing
            try:
                output = original(*args, **kwargs)
            finally:
                del self._local.packing
            if self.newline == "drop":
                output.pooler_output = _without_newlines(output.pooler_output, packing)
            return output

        setattr(core, name, encode)
        yield _Attribute(core, name)

    def rows(self) -> Rows:
        """Which patches share a budget, of the images being encoded."""
        packing: Packing | None = getattr(self._local, "packing", None)
        if packing is None:
            raise AttachError("the projector ran outside of the model's own get_image_features")
        return packing.per_crop() if self.per == "crop" else packing.per_image()


@dataclass(frozen=True)
class _Attribute:
    """An instance attribute that was set."""

    owner: Any
    name: str

    def remove(self) -> None:
        """Show what the class says again."""
        vars(self.owner).pop(self.name, None)


def _without_newlines(features: Any, packing: Packing) -> list[Tensor]:
    """Packed features of each image with marks in place of newline tokens."""
    return [
        each.masked_fill((source == NEWLINE).to(each.device)[:, None], -torch.inf)
        for each, source in zip(features, packing.sources, strict=True)
    ]
