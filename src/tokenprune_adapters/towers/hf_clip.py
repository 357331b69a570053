"""CLIP-like vision towers of transformers (CLIP, SigLIP): signals by hooks on q_proj and k_proj."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from tokenprune.adapter import NotCopyable, Observation, Removable, TowerAdapter
from tokenprune.signals import ClsAttention, Keys, Signal

from ..rows import attention_row
from .taps import Reading


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
        self.reading = Reading(signals, observation, feature_layer, len(self.layers))

    def install(self) -> Iterator[Removable]:
        yield self.tower.register_forward_pre_hook(self.begin, with_kwargs=True)
        for number, kinds in self.reading.kinds().items():
            attention = self.layers[number].self_attn
            rows, keys = ClsAttention in kinds, Keys in kinds
            tap = _LayerTap(self, number, attention, rows=rows, keys=keys)
            yield attention.q_proj.register_forward_hook(tap.query)
            yield attention.k_proj.register_forward_hook(tap.key)
        yield self.layers[self.reading.feature_layer].register_forward_hook(self.features)
        yield self.tower.register_forward_hook(self.finish, always_call=False)

    def begin(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.reading.begin(kwargs["pixel_values"] if "pixel_values" in kwargs else args[0])

    def features(self, layer: nn.Module, args: object, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self.reading.features(hidden[:, self.prefix :])

    def finish(self, tower: nn.Module, args: object, output: object) -> None:
        self.reading.finish()


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
            scratch[Keys, self.number] = rearrange(patches, pattern, heads=heads)
        if self.rows:
            scratch["key", self.number] = output
            self.row()

    def row(self) -> None:
        scratch = self.taps.observation.scratch
        names = ("query", self.number), ("key", self.number)
        if all(name in scratch for name in names):
            query, keys = (scratch.pop(name) for name in names)
            row = attention_row(query, keys, self.attention.num_heads, self.attention.scale)
            scratch[ClsAttention, self.number] = row[:, :, self.taps.prefix :]
