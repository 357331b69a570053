"""CLIP-like vision towers of transformers (CLIP, SigLIP): signals by hooks on q_proj and k_proj."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenprune.adapter import NotCopyable, Observation, Removable, TowerAdapter
from tokenprune.errors import ShapeError
from tokenprune.signals import ClsAttention, Keys, Signal, resolve_layers
from tokenprune.tokens import VisualTokens

from ..fingerprint import fingerprint
from ..rows import attention_row


@dataclass(frozen=True)
class _EncoderTower(TowerAdapter):
    """A tower with `encoder.layers`, each with `self_attn.q_proj` and `k_proj`."""

    prefix: int = 0

    def provides(self, tower: nn.Module) -> frozenset[type[Signal]]:
        return frozenset({Keys, ClsAttention} if self.prefix else {Keys})

    def install(
        self,
        tower: nn.Module,
        signals: frozenset[Signal],
        observation: Observation,
        feature_layer: int,
    ) -> Iterator[Removable]:
        return _Taps(tower, signals, observation, feature_layer, self.prefix).install()


class ClipTowerAdapter(_EncoderTower):
    """`CLIPVisionModel`: one [CLS] token, then the patches."""

    def __init__(self) -> None:
        super().__init__(prefix=1)


class SiglipTowerAdapter(_EncoderTower):
    """`SiglipVisionModel`: patches only, so there is no [CLS] row to read."""


class _Taps(NotCopyable):
    """The hooks of one installation."""

    def __init__(
        self,
        tower: nn.Module,
        signals: frozenset[Signal],
        observation: Observation,
        feature_layer: int,
        prefix: int,
    ) -> None:
        self.tower = tower
        # transformers < 5.6 nests the tower once more.
        inner: Any = getattr(tower, "vision_model", tower)
        self.layers: Any = inner.encoder.layers
        self.observation = observation
        self.prefix = prefix
        count = len(self.layers)
        if not -count <= feature_layer < count:
            raise ShapeError(f"feature_layer={feature_layer} is not one of {count} layers")
        self.feature_layer = feature_layer % count
        self.wanted: dict[Signal, tuple[int, ...]] = {
            signal: (
                resolve_layers(signal.layers, self.feature_layer, count)
                if isinstance(signal, ClsAttention)
                else resolve_layers((signal.layer,), self.feature_layer, count)
            )
            for signal in signals
            if isinstance(signal, (ClsAttention, Keys))
        }

    def install(self) -> Iterator[Removable]:
        yield self.tower.register_forward_pre_hook(self.begin, with_kwargs=True)
        rows, keys = self._layers_of(ClsAttention), self._layers_of(Keys)
        for number in sorted(rows | keys):
            attention = self.layers[number].self_attn
            tap = _LayerTap(self, number, attention, rows=number in rows, keys=number in keys)
            yield attention.q_proj.register_forward_hook(tap.query)
            yield attention.k_proj.register_forward_hook(tap.key)
        yield self.layers[self.feature_layer].register_forward_hook(self.features)
        yield self.tower.register_forward_hook(self.finish, always_call=False)

    def _layers_of(self, kind: type[Signal]) -> set[int]:
        return {n for s, layers in self.wanted.items() if isinstance(s, kind) for n in layers}

    def begin(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.observation.begin()
        pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        self.observation.scratch["ids"] = fingerprint(pixels)

    def features(self, layer: nn.Module, args: object, output: Any) -> None:
        if not self.observation.running:
            return
        hidden = output[0] if isinstance(output, tuple) else output
        self.observation.scratch["features"] = hidden.detach()[:, self.prefix :]

    def finish(self, tower: nn.Module, args: object, output: object) -> None:
        scratch = self.observation.scratch
        tokens = VisualTokens.of(
            scratch["features"], ids=scratch["ids"].to(scratch["features"].device)
        )
        answers: dict[Signal, Tensor] = {}
        for signal, layers in self.wanted.items():
            if isinstance(signal, ClsAttention):
                answers[signal] = torch.stack([scratch["rows", n] for n in layers], dim=1)
            else:
                answers[signal] = scratch["keys", layers[0]]
        self.observation.finish(tokens, answers)


@dataclass(eq=False)
class _LayerTap(NotCopyable):
    """Hooks of one attention block: the row is computed in the later of the two.

    Signals take no part in autograd, and a layer that gradient checkpointing runs once more, long
    after the tower is done, is not observed again.
    """

    taps: _Taps
    number: int
    attention: Any
    rows: bool
    keys: bool

    def query(self, projection: nn.Module, args: object, output: Tensor) -> None:
        if self.rows and self.taps.observation.running:
            self.taps.observation.scratch["query", self.number] = output.detach()[:, :1]
            self.row()

    def key(self, projection: nn.Module, args: object, output: Tensor) -> None:
        if not self.taps.observation.running:
            return
        output = output.detach()
        scratch = self.taps.observation.scratch
        heads = self.attention.num_heads
        if self.keys:
            pattern = "batch tokens (heads channels) -> batch heads tokens channels"
            patches = output[:, self.taps.prefix :]
            scratch["keys", self.number] = rearrange(patches, pattern, heads=heads)
        if self.rows:
            scratch["key", self.number] = output
            self.row()

    def row(self) -> None:
        scratch = self.taps.observation.scratch
        names = ("query", self.number), ("key", self.number)
        if all(name in scratch for name in names):
            query, keys = (scratch.pop(name) for name in names)
            row = attention_row(query, keys, self.attention.num_heads, self.attention.scale)
            scratch["rows", self.number] = row[:, :, self.taps.prefix :]
