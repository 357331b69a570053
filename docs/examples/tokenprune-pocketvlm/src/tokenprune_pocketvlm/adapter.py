"""Adapters for PocketVLM: hooks that read its tower and shorten its prompts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune import (
    Attended,
    BeforeLLM,
    ClsAttention,
    ModelAdapter,
    Observation,
    Placement,
    Record,
    Removable,
    Signal,
    Stage,
    TowerAdapter,
    UnsupportedError,
)
from tokenprune_adapters.kit.attention_rows import products
from tokenprune_adapters.kit.before_projector import ReduceBeforeProjector
from tokenprune_adapters.kit.short_prompts import ShortPrompts
from tokenprune_adapters.kit.tower_reading import TowerReading, read_block

from .model import IMAGE, Attention, Cache, Output, PocketVLM, Vision


# --8<-- [start:tower]
class VisionAdapter(TowerAdapter):
    """Reads the [CLS] rows of a `Vision` tower."""

    def provides(self, tower: nn.Module) -> frozenset[type[Signal]]:
        return frozenset({ClsAttention})

    def install(
        self,
        tower: nn.Module,
        signals: frozenset[Signal],
        observation: Observation,
        feature_layer: int,
    ) -> Iterator[Removable]:
        assert isinstance(tower, Vision)
        reading = TowerReading(signals, observation, feature_layer, len(tower.blocks))

        def rows(number: int, kinds: frozenset[type[Signal]]) -> Any:
            def hook(module: Attention, args: tuple[Tensor, ...], output: object) -> None:
                query = module.split(module.query(args[0][:, :1]))
                keys = module.split(module.key(args[0]))
                read_block(observation.scratch, number, kinds, query, keys, prefix=1)

            return hook

        yield tower.register_forward_pre_hook(
            lambda _, args, kwargs: reading.begin(args[0] if args else kwargs["pixels"]),
            with_kwargs=True,
        )
        for number, kinds in reading.kinds().items():
            hook = rows(number, frozenset(kinds))
            yield tower.blocks[number].attention.register_forward_hook(hook)
        yield tower.blocks[reading.feature_layer].register_forward_hook(
            lambda _, args, output: reading.features(output[:, 1:])
        )
        yield tower.register_forward_hook(lambda *_: reading.finish())
        # --8<-- [end:tower]


# --8<-- [start:model]
class PocketAdapter(ModelAdapter):
    """Reduces before the projector; the decoder computes and caches the kept tokens only."""

    def provides(self, model: nn.Module, placement: Placement) -> frozenset[type[Signal]]:
        if placement != BeforeLLM():
            raise UnsupportedError(f"PocketVLM offers {BeforeLLM()} alone, not {placement}")
        return VisionAdapter().provides(model)

    def install(
        self, model: nn.Module, stages: tuple[Stage, ...], record: Record
    ) -> Iterator[Removable]:
        assert isinstance(model, PocketVLM)
        if len(stages) > 1:
            raise UnsupportedError("PocketVLM takes one stage; join its steps with '|'")
        strategy, observation = stages[0].strategy, Observation()
        yield from VisionAdapter().install(model.vision, strategy.signals, observation, -1)
        yield from ReduceBeforeProjector(strategy, observation, record).install(model.projector)
        shorten = Shorten(record)
        yield model.decoder.register_forward_pre_hook(shorten.before, with_kwargs=True)
        yield model.register_forward_hook(shorten.cached, with_kwargs=True)
        # --8<-- [end:model]

    # --8<-- [start:watch]
    def watch(self, model: nn.Module, attended: Attended) -> Iterator[Removable]:
        assert isinstance(model, PocketVLM)
        reading = Reading(model, attended)
        yield model.register_forward_pre_hook(reading.begin, with_kwargs=True)
        for block in model.decoder.blocks:
            yield block.attention.register_forward_hook(reading.row)
        yield model.register_forward_hook(reading.end)
        # --8<-- [end:watch]


# --8<-- [start:shorten]
class Shorten:
    """Hooks on the decoder: marked tokens leave the prompt, and later passes follow."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.prompts: ShortPrompts[Cache] = ShortPrompts()

    def before(
        self, decoder: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor], dict[str, Any]]:
        left = self.prompts.enter(kwargs["cache"], args[0], kwargs["mask"], kwargs["positions"])
        kwargs.update(mask=left.mask, positions=left.positions)
        return (left.embeds,), kwargs
        # --8<-- [end:shorten]

    # --8<-- [start:cached]
    def cached(self, model: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Output) -> None:
        given = inspect.signature(PocketVLM.forward).bind(model, *args, **kwargs).arguments
        if given["ids"].shape[1] > 1:  # no decoding step
            cells = [*output.cache.keys, *output.cache.values]
            self.prompts.report(self.record, cells, logical=given["mask"].shape[1])
            # --8<-- [end:cached]


# --8<-- [start:reading]
class Reading:
    """Hooks that compute one attention row of each prompt in each layer, beside the model's own."""

    def __init__(self, model: PocketVLM, attended: Attended) -> None:
        self.model, self.attended = model, attended
        self.where: Tensor | None = None  # (images, tokens, 2): prompt and slot of visual tokens
        self.rows: list[Tensor] = []

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(self.model.forward).bind(*args, **kwargs).arguments
        self.rows = []
        if given.get("pixels") is not None:
            tokens, ids = self.model.config.visual_tokens, given["ids"]
            where = (ids == IMAGE).nonzero().reshape(-1, tokens, 2)
            past = given["mask"].shape[1] - ids.shape[1]  # of earlier turns
            self.where = where + torch.tensor([0, past], device=ids.device)
            patches = torch.arange(tokens, device=ids.device)
            self.attended.begin(patches.expand(len(where), -1))
        elif given.get("cache") is None:  # other prompts, without pictures
            self.where = None
            self.attended.forget()

    @torch.no_grad()
    def row(self, module: Attention, args: tuple[Any, ...], output: object) -> None:
        x, visible, cache, layer = args
        if self.where is None:
            return
        row = products(module.split(module.query(x[:, -1:])), cache.keys[layer])
        row = row.masked_fill(~visible[:, :, -1:], -torch.inf).softmax(-1)[:, :, 0]
        prompt, column = self.where[:, 0, 0], self.where[:, None, :, 1]
        self.rows.append(row[prompt].gather(2, column.expand(-1, row.shape[1], -1)))

    def end(self, model: nn.Module, args: object, output: object) -> None:
        if self.where is not None:
            self.attended.step(torch.stack(self.rows, dim=1))
            # --8<-- [end:reading]
