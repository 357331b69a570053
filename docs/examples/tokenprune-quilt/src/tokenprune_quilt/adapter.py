"""Adapters for `ViTModel` of transformers and for Quilt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from torch import nn

from tokenprune import (
    BeforeLLM,
    ModelAdapter,
    Observation,
    Placement,
    Record,
    Removable,
    Signal,
    Stage,
    UnsupportedError,
)
from tokenprune_adapters.hf.toolkit import EncoderTower, shorten_prompts, tower_adapter
from tokenprune_adapters.kit.before_projector import ReduceBeforeProjector

from .model import Quilt


# --8<-- [start:tower]
class VitTowerAdapter(EncoderTower):
    """`ViTModel`: one [CLS] token, then the patches."""

    def prefix(self, tower: nn.Module) -> int:
        return 1
        # --8<-- [end:tower]


# --8<-- [start:model]
class QuiltAdapter(ModelAdapter):
    """Reduces before the bridge; the Llama computes and caches the kept tokens only."""

    options: ClassVar[Mapping[str, tuple[object, ...]]] = {"positions": ("reindexed", "original")}

    def provides(self, model: nn.Module, placement: Placement) -> frozenset[type[Signal]]:
        if not isinstance(placement, BeforeLLM):
            raise UnsupportedError(f"Quilt offers 'before-llm' alone, not {placement}")
        assert isinstance(model, Quilt)
        return tower_adapter(model.eye).provides(model.eye)

    def install(
        self, model: nn.Module, stages: tuple[Stage, ...], record: Record
    ) -> Iterator[Removable]:
        assert isinstance(model, Quilt)
        if len(stages) > 1:
            raise UnsupportedError("Quilt takes one stage; join its steps with '|'")
        stage, observation = stages[0], Observation()
        assert isinstance(stage.placement, BeforeLLM)
        asked, tower = stage.strategy.signals, tower_adapter(model.eye)
        yield from tower.install(model.eye, asked, observation, feature_layer=-2)
        reduce = ReduceBeforeProjector(stage.strategy, observation, record)
        yield from reduce.install(model.bridge)
        positions = stage.placement.positions or "reindexed"
        yield from shorten_prompts(model.llm.model, record, positions)
        # --8<-- [end:model]
