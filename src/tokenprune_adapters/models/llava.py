"""LLaVA-1.5 of transformers (`LlavaForConditionalGeneration`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from tokenprune.adapter import ModelAdapter, Observation, Removable, TowerAdapter
from tokenprune.budget import Budgeted
from tokenprune.errors import UnsupportedError
from tokenprune.placement import BeforeLLM, Placement
from tokenprune.plugins import registry
from tokenprune.report import Record
from tokenprune.signals import Signal
from tokenprune.spec import spec_of
from tokenprune.strategy import Stage

from ..llms.shorten import ShortenPrompts, check_llm
from ..projection import ReduceBeforeProjector
from ..versions import check_transformers, expanded_images_guard


class LlavaAdapter(ModelAdapter):
    """Reduces before the projector; the language model computes and caches kept tokens only."""

    def provides(self, model: nn.Module, placement: Placement) -> frozenset[type[Signal]]:
        if not isinstance(placement, BeforeLLM):
            raise UnsupportedError(
                f"{type(model).__name__} does not offer {spec_of(placement)!r}; it offers "
                "'before-llm'"
            )
        check_transformers()
        core: Any = model.model
        strategy = core.config.vision_feature_select_strategy
        if strategy != "default":
            raise UnsupportedError(
                f"vision_feature_select_strategy={strategy!r} keeps [CLS] among the patches; only "
                "'default' is supported"
            )
        check_llm(core.language_model)
        return _tower_adapter(core.vision_tower).provides(core.vision_tower)

    def install(
        self, model: nn.Module, stages: tuple[Stage, ...], record: Record
    ) -> Iterator[Removable]:
        stage = _only(stages)
        core: Any = model.model
        tower = core.vision_tower
        observation = Observation()
        yield from _tower_adapter(tower).install(
            tower, stage.strategy.signals, observation, _feature_layer(core.config)
        )
        reduce = ReduceBeforeProjector(stage.strategy, observation, record)
        yield from reduce.install(core.multi_modal_projector)
        assert isinstance(stage.placement, BeforeLLM)
        yield from ShortenPrompts(stage.placement.positions, record).install(core.language_model)
        yield from expanded_images_guard(core)


def _tower_adapter(tower: nn.Module) -> TowerAdapter:
    known = registry()
    return known.claiming(known.towers, tower, None).factory()


def _only(stages: tuple[Stage, ...]) -> Stage:
    if len(stages) > 1:
        raise UnsupportedError(
            f"{len(stages)} stages before the LLM; join them into one: "
            + " | ".join(spec_of(stage.strategy) for stage in stages)
        )
    for step in stages[0].strategy.steps:
        if isinstance(step, Budgeted) and step.per == "frame":
            raise UnsupportedError(f"per='frame' in {spec_of(step)!r}: LLaVA-1.5 has no frames")
    return stages[0]


def _feature_layer(config: Any) -> int:
    """Block whose output is the features, Python style; the last of several.

    `vision_feature_layer` indexes hidden states, of which there is one more than blocks: only
    negative numbers mean the same in both lists.
    """
    layer = config.vision_feature_layer
    layer = layer[-1] if isinstance(layer, (list, tuple)) else layer
    if layer == 0:
        raise UnsupportedError("vision_feature_layer=0 reads the embeddings, which no layer scores")
    return int(layer) if layer < 0 else int(layer) - 1
