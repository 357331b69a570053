"""Wrong towers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from tokenprune_pocketvlm.adapter import VisionAdapter
from tokenprune_pocketvlm.testing import cases
from torch import Tensor, nn

from tokenprune import (
    Observation,
    Removable,
    Signal,
    TowerAdapter,
    TowerPlugin,
    VisualTokens,
)
from tokenprune.testing import TowerCase

from .fault import FAULTS, Fault

TOWER, MODEL = cases()


def tower(number: str, says: str) -> Any:
    def enter(cls: type[TowerAdapter]) -> type[TowerAdapter]:
        name = f"gallery-{len(FAULTS)}"
        assert isinstance(TOWER, TowerCase)
        case = replace(TOWER, name=cls.__name__, adapter=name)
        plugin = TowerPlugin(name, "wrong on purpose", cls, ())
        FAULTS.append(Fault(number, case, says, plugin, cls.__name__))
        return cls

    return enter


class Undo:
    """A handle that calls something."""

    def __init__(self, remove: Any) -> None:
        self.remove = remove


Install = Iterator[Removable]


@tower("T1", "returns something else")
class RoundsTheOutput(VisionAdapter):
    """Casts the features to half on the way."""

    def install(self, tower: Any, *rest: Any) -> Install:
        yield from super().install(tower, *rest)
        yield tower.blocks[0].register_forward_hook(lambda m, a, out: out.half().float())


@tower("T1", "nothing was observed")
class ObservesNothing(VisionAdapter):
    def install(self, tower: Any, *rest: Any) -> Install:
        yield tower.register_forward_hook(lambda m, a, out: None)


class Altered(VisionAdapter):
    """Publishes something else than the tower gave."""

    def alter(self, rows: Tensor) -> Tensor:
        raise NotImplementedError

    def install(
        self,
        tower: nn.Module,
        signals: frozenset[Signal],
        observation: Observation,
        feature_layer: int,
    ) -> Install:
        def change(*_: object) -> None:
            tokens, seen = observation.take()
            observation.begin()
            observation.finish(tokens, {s: self.alter(answer) for s, answer in seen.items()})

        yield from super().install(tower, signals, observation, feature_layer)
        yield tower.register_forward_hook(change)


@tower("T2", "is off by")
class Renormalised(Altered):
    """The [CLS] column left out, and the rest stretched to a sum of one."""

    def alter(self, rows: Tensor) -> Tensor:
        return rows / rows.sum(-1, keepdim=True)


@tower("T2", "outside of [0, 1]")
class LogitsForProbabilities(Altered):
    def alter(self, rows: Tensor) -> Tensor:
        return rows.log()


@tower("T2", "sum to")
class SumsOverHeads(Altered):
    def alter(self, rows: Tensor) -> Tensor:
        return rows.sum(2, keepdim=True).clamp(max=1).expand_as(rows)


@tower("T2", "is off by")
class FirstPictureForAll(Altered):
    def alter(self, rows: Tensor) -> Tensor:
        return rows[:1].expand_as(rows)


@tower("T2", "is off by")
class LayersReversed(Altered):
    def alter(self, rows: Tensor) -> Tensor:
        return rows.flip(1)


@tower("T2", "features")
class FeaturesOfAnotherLayer(VisionAdapter):
    """Positive and negative layer numbers mixed up."""

    def install(self, tower: Any, signals: Any, observation: Any, feature_layer: int) -> Install:
        inner = Observation()
        yield from super().install(tower, signals, inner, feature_layer - 1)

        def publish(*_: object) -> None:
            tokens, seen = inner.take()
            observation.begin()
            observation.finish(tokens, seen)

        yield tower.register_forward_hook(publish)


@tower("T3", "leaves behind")
class TowerHookLeft(VisionAdapter):
    def install(self, tower: Any, *rest: Any) -> Install:
        yield from super().install(tower, *rest)
        tower.blocks[0].register_forward_hook(lambda m, a, out: None)


@tower("T3", "retains what it observed")
class KeepsAttentions(VisionAdapter):
    """A module-level dict shared by hooks (LightCompress)."""

    shared: ClassVar[list[Tensor]] = []

    def install(
        self, tower: Any, signals: Any, observation: Observation, feature_layer: int
    ) -> Install:
        yield from super().install(tower, signals, observation, feature_layer)
        yield tower.register_forward_hook(
            lambda *_: self.shared.extend(observation.signals.values())
        )


@tower("T3", "observing is more than hooks")
class StoresOnTheModule(VisionAdapter):
    """`layer.attn.cached = ...`, read later by whoever knows."""

    def install(self, tower: Any, *rest: Any) -> Install:
        yield from super().install(tower, *rest)
        tower.blocks[0].cached = ()
        yield Undo(lambda: delattr(tower.blocks[0], "cached"))


@tower("T3", "fails after")
class YieldsTooLate(VisionAdapter):
    """Installs everything first and then yields: what it had done by a failure stays."""

    def install(self, tower: Any, *rest: Any) -> Install:
        yield from list(super().install(tower, *rest))


# Nothing but the tower itself to compare with: the case has no oracle.


def blind(number: str, says: str) -> Any:
    def enter(cls: type[TowerAdapter]) -> type[TowerAdapter]:
        entered: type[TowerAdapter] = tower(number, says)(cls)
        case = FAULTS[-1].subject
        assert isinstance(case, TowerCase)
        FAULTS[-1] = replace(FAULTS[-1], subject=replace(case, oracle=None, features=None))
        return entered

    return enter


@blind("T4", "is [CLS] or a register taken for a patch?")
class RowsOffByOne(Altered):
    def alter(self, rows: Tensor) -> Tensor:
        return rows.roll(1, dims=-1)


@blind("T4", "is [CLS] or a register taken for a patch?")
class FeaturesOffByOne(VisionAdapter):
    """[CLS] among the features, and the last patch left out."""

    def install(self, tower: Any, signals: Any, observation: Any, feature_layer: int) -> Install:
        yield from super().install(tower, signals, observation, feature_layer)

        def change(*_: object) -> None:
            tokens, seen = observation.take()
            observation.begin()
            observation.finish(replace(tokens, features=tokens.features.roll(1, dims=1)), seen)

        yield tower.register_forward_hook(change)


@blind("T4", "make no grid on pictures of")
class RegisterForPatch(VisionAdapter):
    """Everything but the first token is taken for a patch: here [CLS] itself stands for one."""

    def install(self, tower: Any, signals: Any, observation: Any, feature_layer: int) -> Install:
        yield from super().install(tower, signals, observation, feature_layer)

        def change(*_: object) -> None:
            tokens, seen = observation.take()
            wide = VisualTokens.of(torch.cat([tokens.features[:, :1], tokens.features], 1))
            rows = {s: torch.cat([x[..., :1], x], -1) for s, x in seen.items()}
            observation.begin()
            observation.finish(wide, rows)

        yield tower.register_forward_hook(change)


@blind("T5", "is the scale of the attention left out?")
class ScaleLeftOut(Altered):
    """Queries times keys, without the root of the channels."""

    def alter(self, rows: Tensor) -> Tensor:
        powers = rows.double() ** (8**0.5)
        return (powers / powers.sum(-1, keepdim=True) * rows.sum(-1, keepdim=True)).float()


@blind("T5", "equals the oracle shifted")
class ShiftedRows(Altered):
    def alter(self, rows: Tensor) -> Tensor:
        return rows.roll(-1, dims=-1)


@blind("T5", "backwards along axis 1")
class LayersBackwards(Altered):
    def alter(self, rows: Tensor) -> Tensor:
        return rows.flip(1)


@tower("T6", "different pictures have the ids")
class NoIds(VisionAdapter):
    """`VisualTokens.of(features)`, and nothing about pictures."""

    def install(self, tower: Any, signals: Any, observation: Any, feature_layer: int) -> Install:
        yield from super().install(tower, signals, observation, feature_layer)

        def change(*_: object) -> None:
            tokens, seen = observation.take()
            observation.begin()
            observation.finish(VisualTokens.of(tokens.features), seen)

        yield tower.register_forward_hook(change)


@tower("T6", "in another batch")
class NumbersForIds(VisionAdapter):
    """Ids count the rows of the batch."""

    def install(self, tower: Any, signals: Any, observation: Any, feature_layer: int) -> Install:
        yield from super().install(tower, signals, observation, feature_layer)

        def change(*_: object) -> None:
            tokens, seen = observation.take()
            ids = torch.arange(len(tokens.mask), device=tokens.mask.device)
            observation.begin()
            observation.finish(VisualTokens.of(tokens.features, ids=ids), seen)

        yield tower.register_forward_hook(change)
