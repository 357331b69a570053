"""LLaVA-NeXT of transformers (`LlavaNextForConditionalGeneration`): any-resolution images."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.adapter import ModelAdapter
from tokenprune.budget import Budgeted, Per
from tokenprune.errors import AttachError, UnsupportedError
from tokenprune.hooks import NotCopyable, Removable
from tokenprune.kept_patches import Origin
from tokenprune.observation import Attended, Observation
from tokenprune.placement import BeforeLLM, Newline, Placement
from tokenprune.report import Record
from tokenprune.signals import (
    ClsAttention,
    Signal,
    Signals,
)
from tokenprune.spec import shown
from tokenprune.strategy import Stage

from ..kit.before_projector import ReduceBeforeProjector
from ..kit.budget_rows import BudgetRows
from ..kit.method_wrapper import wrap_method
from .anatomy import Anatomy
from .anyres import NEWLINE, Packing
from .checks import Encoders, check_method, check_model
from .chunked_prefill import lost_images_guard
from .llava_parts import check_budgets, check_select_strategy, same_layers, tower_adapter
from .llm.image_slots import Images
from .llm.signal_cache import SignalCache
from .names import Call, Signature
from .outputs import Output
from .stage_hooks import FindImages, Placed, check_placement, readable
from .watch_attention import WatchAttention

_ENCODE = "get_image_features"
_ENCODERS: Encoders = {_ENCODE: (Call.pixels, Call.sizes)}


class LlavaNextAdapter(ModelAdapter):
    """Adapter of LLaVA-NeXT: reduces before the projector, after decoder layers, or both.

    Grid, unpadding and newlines stay the model's own.

    With ``per="image"`` (the default) a budget counts patches of an image over its base view and
    all tiles, with ``per="crop"`` those of every crop (FasterVLM). Patches that unpadding cuts away
    are not there to be kept. Newline tokens are text: kept and never counted, unless the
    placement says ``newline="drop"``.
    """

    def provides(self, model: nn.Module, placement: Placement) -> frozenset[type[Signal]]:
        check_placement(model, placement)
        parts = Anatomy.of(model)
        check_model(parts, placement, _ENCODERS)
        check_method(parts, "pack_image_features", Call.sizes, Call.select)
        (tower,) = parts.towers
        provided = tower_adapter(tower).provides(tower)
        check_select_strategy(parts, has_cls=ClsAttention in provided)
        return readable(placement, provided)

    def install(
        self, model: nn.Module, stages: tuple[Stage, ...], record: Record
    ) -> Iterator[Removable]:
        parts = Anatomy.of(model)
        check_budgets(stages)
        placed = Placed.of(stages, parts.llm)
        store = SignalCache(parts.core.get_input_embeddings().weight.dtype)
        pack = _PackImages(parts, _per(placed), _newline(placed), store if placed.inside else None)
        if placed.before is not None or placed.inside:
            yield from same_layers(parts, _ENCODERS)
            observation = Observation()
            (tower,) = parts.towers
            yield from tower_adapter(tower).install(
                tower, placed.of_tower, observation, parts.feature_layer
            )
            yield from pack.install()
            later = pack.known if placed.inside else None
            reduce = ReduceBeforeProjector(placed.strategy, observation, record, later, pack.rows)
            yield from reduce.install(parts.projector)
        yield from placed.install(parts, FindImages(parts.core, pack.find), store, record)
        yield from lost_images_guard(parts)

    def watch(self, model: nn.Module, attended: Attended) -> Iterator[Removable]:
        self.provides(model, BeforeLLM())
        parts = Anatomy.of(model)
        store = SignalCache(parts.core.get_input_embeddings().weight.dtype)
        pack = _PackImages(parts, "image", "keep", store)
        yield from pack.install()
        yield from WatchAttention(parts, FindImages(parts.core, pack.find), attended).install()
        yield from lost_images_guard(parts)


def _per(placed: Placed) -> Per:
    """What the budgets before the LLM are for; inside of it, images are all that is known."""
    for stage in placed.inside.values():
        if "crop" in _pers(stage):
            raise UnsupportedError(
                f"per='crop' in {shown(stage.strategy)!r}: inside the language model crops are "
                "packed into one sequence; give a budget per image"
            )
    found = set() if placed.before is None else _pers(placed.before)
    if len(found) > 1:
        raise UnsupportedError(f"steps of one stage must share per, got {sorted(found)}")
    per = found.pop() if found else "image"
    if per == "crop" and placed.inside:
        raise UnsupportedError(
            "per='crop' before the LLM cannot be combined with stages after a layer; give a budget "
            "per image"
        )
    return per


def _pers(stage: Stage) -> set[Per]:
    return {step.per for step in stage.strategy.steps if isinstance(step, Budgeted)}


def _newline(placed: Placed) -> Newline:
    if placed.before is None:
        return "keep"
    assert isinstance(placed.before.placement, BeforeLLM)
    return placed.before.placement.newline


class _PackImages(NotCopyable):
    """Packing of the images that a model encodes, known before their crops are packed.

    The sizes of the images reach `get_image_features` and nothing below it, and `generate` calls
    that method from outside of any `forward`, so the one method is wrapped on the one instance.

    Args:
        parts: the parts of the model.
        per: what budgets before the LLM are for.
        newline: what becomes of newline tokens.
        store: where to leave what is known of packed images, for stages inside the LLM; or None.
    """

    def __init__(
        self, parts: Anatomy, per: Per, newline: Newline, store: SignalCache | None
    ) -> None:
        self.parts = parts
        self.signature = Signature.of(getattr(parts.core, _ENCODE))
        self.per = per
        self.newline = newline
        self.store = store
        self._local = threading.local()

    def install(self) -> Iterator[Removable]:
        """Yield the handle."""
        yield from wrap_method(self.parts.core, _ENCODE, self._encode)

    def _encode(self, call: Callable[[], Any], arguments: Mapping[str, Any]) -> Any:
        sizes = Call(self.signature, (), dict(arguments)).sizes
        packing = _packing(self.parts, sizes)
        self._local.packing = packing
        try:
            output = call()
        finally:
            del self._local.packing
        if isinstance(output, tuple):  # of a caller's own; the model never takes one back
            return output
        features: Any = Output(output).features
        if self.newline == "drop":
            features = _without_newlines(features, packing)
            output = Output(output).replaced(features=features)
        if self.store is not None:
            known = getattr(self._local, "known", Signals())
            self.store.put(features, known, packing.patches)
        return output

    def rows(self) -> BudgetRows:
        """Which patches share a budget, of the images being encoded."""
        packing: Packing | None = getattr(self._local, "packing", None)
        if packing is None:
            raise AttachError("the projector ran outside of the model's own get_image_features")
        return packing.per_crop() if self.per == "crop" else packing.per_image()

    def known(self, features: Tensor, signals: Signals) -> None:
        """Take what is known of the images being encoded."""
        self._local.known = signals

    def find(self, ids: Tensor, call: Call) -> Images:
        """The images of a call of the whole model."""
        encoded = (call.encoded or {}).get("image")
        if encoded is None:
            patches = _packing(self.parts, call.sizes).patches
        else:
            assert self.store is not None
            features: Any = Output(encoded).features
            patches = self.store.patches(features)
        origins = [
            Origin(image, patches_per_crop=self.parts.patches_per_crop)
            for image in range(len(patches))
        ]
        return Images.of(self.parts.placeholders(ids, "image"), patches, origins)


def _packing(parts: Anatomy, sizes: Any) -> Packing:
    return Packing.of(parts.core, torch.as_tensor(sizes, device="cpu"), parts.patches_per_crop)


def _without_newlines(features: Any, packing: Packing) -> list[Tensor]:
    """Packed features of each image with marks in place of newline tokens."""
    return [
        each.masked_fill((source == NEWLINE).to(each.device)[:, None], -torch.inf)
        for each, source in zip(features, packing.sources, strict=True)
    ]
