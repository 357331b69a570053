"""Adapters for PocketVLM: hooks that read its tower and shorten its prompts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tokenprune import (
    Attended,
    BeforeLLM,
    ClsAttention,
    ModelAdapter,
    Observation,
    Placement,
    Plan,
    Record,
    Removable,
    Signal,
    Stage,
    Strategy,
    TowerAdapter,
    UnsupportedError,
    VisualTokens,
)
from tokenprune.signals import resolve_layers

from .model import IMAGE, Attention, Cache, PocketVLM, Vision


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
        count = len(tower.blocks)
        last = feature_layer % count
        wanted = {
            signal: resolve_layers(signal.layers, last, count)
            for signal in signals
            if isinstance(signal, ClsAttention)
        }

        def begin(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            observation.begin()
            pixels = args[0] if args else kwargs["pixels"]
            # A number per picture, from its pixels: what is random is seeded by it.
            bits = pixels.detach().flatten(1).contiguous().view(torch.int32).long()
            observation.scratch["ids"] = (bits * torch.arange(1, 1 + bits.shape[1])).sum(1)

        def rows(number: int) -> Any:
            def hook(module: Attention, args: tuple[Tensor, ...], output: object) -> None:
                query = module.split(module.query(args[0][:, :1])).float()
                keys = module.split(module.key(args[0])).float()
                row = (query @ keys.mT / keys.shape[-1] ** 0.5).softmax(-1)
                observation.scratch["rows", number] = row[:, :, 0, 1:]

            return hook

        def features(module: nn.Module, args: object, output: Tensor) -> None:
            observation.scratch["features"] = output[:, 1:]

        def finish(module: nn.Module, args: object, output: object) -> None:
            seen = observation.scratch
            tokens = VisualTokens.of(seen["features"], ids=seen["ids"])
            answers = {
                signal: torch.stack([seen["rows", layer] for layer in layers], dim=1)
                for signal, layers in wanted.items()
            }
            observation.finish(tokens, answers)

        yield tower.register_forward_pre_hook(begin, with_kwargs=True)
        for number in {layer for layers in wanted.values() for layer in layers}:
            yield tower.blocks[number].attention.register_forward_hook(rows(number))
        yield tower.blocks[last].register_forward_hook(features)
        yield tower.register_forward_hook(finish)
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
        reduce = Reduce(strategy, observation, record)
        yield model.projector.register_forward_pre_hook(reduce.before)
        yield model.projector.register_forward_hook(reduce.after)
        shorten = Shorten()
        yield model.decoder.register_forward_pre_hook(shorten.before, with_kwargs=True)
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


# --8<-- [start:reduce]
class Reduce:
    """Hooks on the projector: it projects the kept tokens; the others come out as -inf."""

    def __init__(self, strategy: Strategy, observation: Observation, record: Record) -> None:
        self.strategy, self.observation, self.record = strategy, observation, record

    def before(self, projector: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        tokens, signals = self.observation.take()
        with self.record.selecting(tokens.features.device):
            reduction = self.strategy(tokens, signals)
        self.record.reduced(reduction, tokens.lengths)
        features = reduction.tokens.features.view_as(reduction.tokens.features)
        features.plan = reduction.plan  # type: ignore[attr-defined]
        return (features,)

    def after(self, projector: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        plan: Plan = args[0].plan  # type: ignore[attr-defined]
        marked = output.new_full((len(output), plan.tokens, output.shape[2]), -torch.inf)
        rows, places = plan.mask.nonzero(as_tuple=True)
        marked[rows, plan.anchors[plan.mask]] = output[rows, places]
        return marked
        # --8<-- [end:reduce]


# --8<-- [start:shorten]
@dataclass(frozen=True, eq=False)
class Stored:
    """What a cache holds of a shortened prompt.

    Attributes:
        mask: `(batch, stored)` bool, False for padding.
        logical: slots of the prompt before it was shortened.
        moved: `(batch,)` by how much later positions move down.
    """

    mask: Tensor
    logical: int
    moved: Tensor


class Shorten:
    """A hook on the decoder: marked tokens leave the prompt, and later positions follow."""

    def __init__(self) -> None:
        self.prompts: WeakKeyDictionary[Cache, Stored] = WeakKeyDictionary()

    def before(
        self, decoder: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor], dict[str, Any]]:
        embeds, mask, positions = args[0], kwargs["mask"], kwargs["positions"]
        prompt = self.prompts.get(kwargs["cache"])
        if prompt is not None:  # a later step: the past is shorter than the caller thinks
            kwargs["mask"] = torch.cat([prompt.mask, mask[:, prompt.logical :]], dim=1)
            kwargs["positions"] = positions - prompt.moved[:, None]
            return args, kwargs
        dropped = embeds[:, :, 0].isneginf()
        if not bool(dropped.any()):
            return args, kwargs
        keep = mask & ~dropped
        # The kept slots to the right, in their order; what is left of them is padding.
        width = int(keep.sum(1).max())
        order = keep.to(torch.uint8).argsort(dim=1, stable=True)[:, -width:]
        kept = keep.gather(1, order)
        positions = positions - dropped.cumsum(1)
        stored = Stored(kept, mask.shape[1], dropped.sum(1))
        self.prompts[kwargs["cache"]] = stored
        kwargs.update(mask=kept, positions=positions.gather(1, order).where(kept, 0))
        embeds = embeds[torch.arange(len(order))[:, None], order]
        return (embeds.masked_fill(~kept[:, :, None], 0),), kwargs
        # --8<-- [end:shorten]


# --8<-- [start:reading]
class Reading:
    """Hooks that compute one row of attention for each prompt and layer, beside the model's own."""

    def __init__(self, model: PocketVLM, attended: Attended) -> None:
        self.model, self.attended = model, attended
        self.where: Tensor | None = None  # (images, tokens, 2): row and column of visual tokens
        self.rows: list[Tensor] = []

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(self.model.forward).bind(*args, **kwargs).arguments
        self.rows = []
        if given.get("pixels") is not None:
            tokens = self.model.config.visual_tokens
            self.where = (given["ids"] == IMAGE).nonzero().reshape(-1, tokens, 2)
            self.attended.begin(torch.arange(tokens).expand(len(self.where), -1))
        elif given.get("cache") is None:  # other prompts, without pictures
            self.where = None
            self.attended.forget()

    @torch.no_grad()
    def row(self, module: Attention, args: tuple[Any, ...], output: object) -> None:
        x, visible, cache, layer = args
        if self.where is None:
            return
        query, keys = module.split(module.query(x[:, -1:])).float(), cache.keys[layer].float()
        logits = query @ keys.mT / keys.shape[-1] ** 0.5
        row = logits.masked_fill(~visible[:, :, -1:], -torch.inf).softmax(-1)[:, :, 0]
        prompt, column = self.where[:, 0, 0], self.where[:, None, :, 1]
        self.rows.append(row[prompt].gather(2, column.expand(-1, row.shape[1], -1)))

    def end(self, model: nn.Module, args: object, output: object) -> None:
        if self.where is not None:
            self.attended.step(torch.stack(self.rows, dim=1))
            # --8<-- [end:reading]
