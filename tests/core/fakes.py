"""Plugins, models and adapters that exist for tests alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tokenprune import (
    BeforeLLM,
    ClsAttention,
    ModelAdapter,
    Observation,
    Placement,
    Record,
    Removable,
    Scorer,
    Signal,
    Signals,
    Stage,
    TowerAdapter,
    UnsupportedError,
    VisualTokens,
    builtin,
    hookimpl,
)
from tokenprune.plugins import CORE, Registry
from tokenprune.plugins.discovery import build_registry


@dataclass(frozen=True)
class SaysScorer(Scorer):
    """A scorer with a text for an argument."""

    text: str = ""
    more: tuple[str, ...] = ()

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        return torch.zeros(tokens.mask.shape)


class FakeEntry:
    """What `importlib.metadata.EntryPoint` is to us: a name, a distribution, `load`."""

    def __init__(self, name: str, dist: str | None, load: Callable[[], object]) -> None:
        self.name = name
        self.value = f"{name}.plugin"
        self.dist = None if dist is None else SimpleNamespace(name=dist)
        self.load = load


def entry(name: str, plugin: object, dist: str | None = None) -> FakeEntry:
    return FakeEntry(name, name if dist is None else dist, lambda: plugin)


def module_with(**hooks: object) -> ModuleType:
    """A plugin module: hooks yield the given records, or are taken as they are if callable."""
    module = ModuleType("fake_plugin")
    for kind, records in hooks.items():
        hook = records if callable(records) else (lambda records=records: records)
        setattr(module, f"tokenprune_{kind}", hookimpl(hook))
    return module


def registry_of(*entries: FakeEntry) -> Registry:
    return build_registry(entries, {CORE: builtin})  # type: ignore[arg-type]


@contextmanager
def installed(*entries: FakeEntry) -> Iterator[Registry]:
    """Pretend that these plugins, and no others, are installed."""
    with installed_in(registry_of(*entries)) as known:
        yield known


@contextmanager
def installed_in(known: Registry) -> Iterator[Registry]:
    """Pretend that this is what is installed."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("tokenprune.spec", "tokenprune.attachment", "tokenprune.stage_support"):
            patch.setattr(sys.modules[name], "registry", lambda: known)
        yield known


class Tower(nn.Module):
    """One linear layer; its output are the visual tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.layer(pixels)
        return out


class Model(nn.Module):
    """A tower and a head that means over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = Tower()
        self.head = nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.head(self.tower(pixels)).mean(1)
        return out


class Nearer(Model):
    """A subclass, which an adapter of its own may claim."""


class FakeAdapter(ModelAdapter):
    """Reduces before the head. `fail_at` breaks the installation after so many hooks."""

    given: frozenset[type[Signal]] = frozenset({ClsAttention})
    fail_at: int | None = None

    def provides(self, model: nn.Module, placement: Placement) -> frozenset[type[Signal]]:
        if not isinstance(placement, BeforeLLM):
            raise UnsupportedError("Model offers 'before-llm' only")
        return self.given

    def install(
        self, model: nn.Module, stages: tuple[Stage, ...], record: Record
    ) -> Iterator[Removable]:
        def reduce(head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            tokens = VisualTokens.of(args[0])
            with record.selecting(args[0].device):
                rows = torch.rand(len(args[0]), 1, 1, args[0].shape[1])
                reduction = stages[0].strategy(tokens, Signals({ClsAttention(1): rows}))
            record.reduced(reduction, tokens.lengths)
            return (reduction.tokens.features,)

        for number in range(3):
            if number == self.fail_at:
                raise RuntimeError("half-way")
            where = (model.tower, model.tower.layer, model.head)[number]  # type: ignore[union-attr]
            assert isinstance(where, nn.Module)
            if number < 2:
                yield where.register_forward_hook(lambda *_: None)
            else:
                yield where.register_forward_pre_hook(reduce)


class FakeTowerAdapter(TowerAdapter):
    """Gives [CLS] rows that are the mean of each token."""

    def provides(self, tower: nn.Module) -> frozenset[type[Signal]]:
        return frozenset({ClsAttention})

    def install(
        self,
        tower: nn.Module,
        signals: frozenset[Signal],
        observation: Observation,
        feature_layer: int,
    ) -> Iterator[Removable]:
        def finish(module: nn.Module, args: object, output: Tensor) -> None:
            rows = output.mean(-1)[:, None, None, :]
            observation.finish(VisualTokens.of(output), dict.fromkeys(signals, rows))

        yield tower.register_forward_pre_hook(lambda *_: observation.begin())
        yield tower.register_forward_hook(finish)


def name_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def hooks_in(model: nn.Module) -> int:
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return sum(len(getattr(part, kind)) for part in model.modules() for kind in kinds)
