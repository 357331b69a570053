"""LLaVA-1.5 of transformers (`LlavaForConditionalGeneration`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from tokenprune.adapter import ModelAdapter
from tokenprune.hooks import Removable
from tokenprune.observation import Attended, Observation
from tokenprune.placement import BeforeLLM, Placement
from tokenprune.report import Record
from tokenprune.signals import ClsAttention, Signal
from tokenprune.strategy import Stage

from ..kit.before_projector import ReduceBeforeProjector
from .anatomy import Anatomy
from .checks import Encoders, check_model
from .chunked_prefill import lost_images_guard
from .families import LLAVA_PIXTRAL, PIXTRAL
from .family_adapter import FamilyAdapter
from .llava_parts import check_budgets, check_select_strategy, same_layers, tower_adapter
from .llm.image_slots import Images
from .llm.signal_cache import SignalCache
from .names import Call
from .outputs import Output
from .stage_hooks import FindImages, Placed, check_placement, readable
from .watch_attention import WatchAttention

_ENCODERS: Encoders = {"get_image_features": (Call.pixels,)}


class LlavaAdapter(ModelAdapter):
    """Adapter of LLaVA-1.5: reduces before the projector, after decoder layers, or both.

    The language model computes and caches, from each place on, the tokens kept there. With a
    Pixtral tower, what is reduced before it is what comes out of the projector.
    """

    def provides(self, model: nn.Module, placement: Placement) -> frozenset[type[Signal]]:
        check_placement(model, placement)
        described = _described(model)
        if described is not None:
            return described.provides(model, placement)
        parts = Anatomy.of(model)
        check_model(parts, placement, _ENCODERS)
        (tower,) = parts.towers
        provided = tower_adapter(tower).provides(tower)
        check_select_strategy(parts, has_cls=ClsAttention in provided)
        return readable(placement, provided)

    def install(
        self, model: nn.Module, stages: tuple[Stage, ...], record: Record
    ) -> Iterator[Removable]:
        described = _described(model)
        if described is not None:
            yield from described.install(model, stages, record)
            return
        parts = Anatomy.of(model)
        check_budgets(stages)
        placed = Placed.of(stages, parts.llm)
        store = SignalCache(parts.core.get_input_embeddings().weight.dtype)
        if placed.before is not None or placed.inside:
            yield from same_layers(parts, _ENCODERS)
            observation = Observation()
            (tower,) = parts.towers
            yield from tower_adapter(tower).install(
                tower, placed.of_tower, observation, parts.feature_layer
            )
            later = store.put if placed.inside else None
            reduce = ReduceBeforeProjector(placed.strategy, observation, record, later)
            yield from reduce.install(parts.projector)
        find = FindImages(parts.core, _finder(parts))
        yield from placed.install(parts, find, store, record)
        yield from lost_images_guard(parts)

    def watch(self, model: nn.Module, attended: Attended) -> Iterator[Removable]:
        described = _described(model)
        if described is not None:
            yield from described.watch(model, attended)
            return
        self.provides(model, BeforeLLM())
        parts = Anatomy.of(model)
        find = FindImages(parts.core, _finder(parts))
        yield from WatchAttention(parts, find, attended).install()
        yield from lost_images_guard(parts)


def _described(model: nn.Module) -> ModelAdapter | None:
    """The adapter of a model whose tower packs pictures of any size, as its family says."""
    (tower,) = Anatomy.of(model).towers
    return FamilyAdapter(LLAVA_PIXTRAL) if type(tower).__name__ == PIXTRAL else None


def _finder(parts: Anatomy) -> Callable[[Tensor, Call], Images]:
    """How to find images that all have the same number of tokens."""

    def find(ids: Tensor, call: Call) -> Images:
        encoded = (call.encoded or {}).get("image")
        given: Any = call.pictures if encoded is None else Output(encoded).features
        return Images.alike(parts.placeholders(ids, "image"), len(given), parts.patches_per_crop)

    return find
