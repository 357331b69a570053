"""LLaVA-1.5 of transformers (`LlavaForConditionalGeneration`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from tokenprune.adapter import Attended, ModelAdapter, Observation, Removable
from tokenprune.placement import BeforeLLM, Placement
from tokenprune.report import Record
from tokenprune.signals import ClsAttention, Signal
from tokenprune.strategy import Stage

from ..llms.images import Images
from ..llms.shorten import check_llm
from ..llms.store import SignalStore
from ..projection import ReduceBeforeProjector
from ..versions import check_transformers, expanded_images_guard, lost_images_guard
from .parts import (
    check_budgets,
    check_select_strategy,
    feature_layer,
    tower_adapter,
)
from .placed import FindImages, Placed, check_placement, readable
from .watched import WatchAttention


class LlavaAdapter(ModelAdapter):
    """Reduces before the projector, after decoder layers, or both.

    The language model computes and caches, from each place on, the tokens kept there.
    """

    def provides(self, model: nn.Module, placement: Placement) -> frozenset[type[Signal]]:
        check_placement(model, placement)
        check_transformers()
        core: Any = model.model
        check_llm(core.language_model)
        provided = tower_adapter(core.vision_tower).provides(core.vision_tower)
        check_select_strategy(core, core.vision_tower, has_cls=ClsAttention in provided)
        return readable(placement, provided)

    def install(
        self, model: nn.Module, stages: tuple[Stage, ...], record: Record
    ) -> Iterator[Removable]:
        core: Any = model.model
        check_budgets(stages)
        placed = Placed.of(stages, core.language_model)
        store = SignalStore(core.get_input_embeddings().weight.dtype)
        if placed.before is not None or placed.inside:
            observation = Observation()
            yield from tower_adapter(core.vision_tower).install(
                core.vision_tower, placed.of_tower, observation, feature_layer(core.config)
            )
            later = store.put if placed.inside else None
            reduce = ReduceBeforeProjector(placed.strategy, observation, record, later)
            yield from reduce.install(core.multi_modal_projector)
        yield from placed.install(model, FindImages(_finder(core)), store, record)
        yield from expanded_images_guard(core)
        yield from lost_images_guard(core)

    def watch(self, model: nn.Module, attended: Attended) -> Iterator[Removable]:
        self.provides(model, BeforeLLM())
        core: Any = model.model
        yield from WatchAttention(model, FindImages(_finder(core)), attended).install()
        yield from expanded_images_guard(core)
        yield from lost_images_guard(core)


def _finder(core: Any) -> Callable[[Tensor, dict[str, Any]], Images]:
    """How to find images that all have the same number of tokens."""
    vision = core.config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2

    def find(ids: Tensor, kwargs: dict[str, Any]) -> Images:
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        given = kwargs["pixel_values"] if encoded is None else encoded.pooler_output
        return Images.alike(ids == core.config.image_token_id, len(given), tokens)

    return find
