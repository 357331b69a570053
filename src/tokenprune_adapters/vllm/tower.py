"""Signals of vLLM's CLIP tower, by hooks on `qkv_proj`; its attention kernel stays on."""

from __future__ import annotations

from functools import partial
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from tokenprune.hooks import NotCopyable
from tokenprune.observation import Observation
from tokenprune.signals import Signal

from ..kit.tower_reading import TowerReading, read_block
from .heads import Gather, gather_heads

CLS = 1
"""Tokens before the patches."""


class ClipTaps(NotCopyable):
    """Hooks on a tower that are never removed: the model is one of ours.

    Args:
        tower: vLLM's `CLIPVisionModel`, which ends at the layer that gives the features.
        signals: what to read.
        feature_layer: Python-style index of that layer, among those that the checkpoint has.
        gather: joins heads of all tensor-parallel processes.
    """

    def __init__(
        self, tower: Any, signals: frozenset[Signal], feature_layer: int, gather: Gather
    ) -> None:
        self.observation = Observation()
        blocks = tower.vision_model.config.num_hidden_layers
        self.reading = TowerReading(signals, self.observation, feature_layer, blocks)
        layers = tower.vision_model.encoder.layers
        tower.register_forward_pre_hook(self._begin, with_kwargs=True)
        for number, kinds in self.reading.kinds().items():
            attention = layers[number].self_attn
            tap = partial(self._read, number, frozenset(kinds), attention.num_heads_per_partition)
            attention.qkv_proj.register_forward_hook(tap)
        layers[self.reading.feature_layer].register_forward_hook(self._features)
        # With mm_encoder_tp_mode="data" every process has all heads, of pictures of its own.
        shared = layers[self.reading.feature_layer].self_attn.tp_size > 1
        self._whole = partial(gather_heads, gather=gather) if shared else None
        self._heads = (lambda x: gather(x.contiguous(), 1)) if shared else None
        tower.register_forward_hook(self._finish)

    def _begin(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.reading.begin(kwargs["pixel_values"] if "pixel_values" in kwargs else args[0])

    def _read(
        self,
        number: int,
        kinds: frozenset[type[Signal]],
        heads: int,
        projection: nn.Module,
        args: object,
        output: tuple[Tensor, object],
    ) -> None:
        split = "batch tokens (which heads channels) -> which batch heads tokens channels"
        query, keys, _ = rearrange(output[0].detach(), split, which=3, heads=heads)
        read_block(self.observation.scratch, number, kinds, query, keys, CLS, self._heads)

    def _features(self, layer: nn.Module, args: object, output: Tensor) -> None:
        self.reading.features(output[:, CLS:])

    def _finish(self, tower: nn.Module, args: object, output: object) -> None:
        self.reading.finish(self._whole)
