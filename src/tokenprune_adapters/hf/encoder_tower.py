"""Vision towers of transformers (CLIP, SigLIP, DINOv2): signals by hooks on q_proj and k_proj."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenprune.adapter import TowerAdapter
from tokenprune.errors import AttachError, UnsupportedError
from tokenprune.hooks import NotCopyable, Removable
from tokenprune.observation import Observation
from tokenprune.signals import (
    ClsAttention,
    GivenAttention,
    JointClsAttention,
    Keys,
    PoolAttention,
    ReceivedAttention,
    Signal,
)

from ..kit.query_key_maps import QueryKeyMaps
from ..kit.tower_reading import TowerReading, read_block
from .anatomy import part
from .names import calls_of
from .split_heads import refuse_split_channels


class EncoderTower(TowerAdapter):
    """Adapter of a tower with blocks whose attention has `q_proj` and `k_proj`.

    Blocks are looked for at ``encoder.layers``, ``encoder.layer`` and ``layers``, their attention
    at ``self_attn`` and ``attention``. A subclass says what stands in front of the patches.
    """

    def prefix(self, tower: nn.Module) -> int:
        """Number of tokens in front of the patches: [CLS] first, then registers; 0 for none."""
        return 0

    def provides(self, tower: nn.Module) -> frozenset[type[Signal]]:
        common: frozenset[type[Signal]] = frozenset({Keys, ReceivedAttention, GivenAttention})
        has_cls = self.prefix(tower) > 0
        cls: set[type[Signal]] = {ClsAttention, JointClsAttention} if has_cls else set()
        pool: set[type[Signal]] = {PoolAttention} if _pool(tower) is not None else set()
        return common | cls | pool

    def install(
        self,
        tower: nn.Module,
        signals: frozenset[Signal],
        observation: Observation,
        feature_layer: int,
    ) -> Iterator[Removable]:
        return _Taps(tower, signals, observation, feature_layer, self.prefix(tower)).install()


class ClipTowerAdapter(EncoderTower):
    """`CLIPVisionModel`: one [CLS] token, then the patches."""

    def prefix(self, tower: nn.Module) -> int:
        return 1


class SiglipTowerAdapter(EncoderTower):
    """`SiglipVisionModel`, `Siglip2VisionModel`: no [CLS] row, but the pooling head has one."""


class Dinov2TowerAdapter(EncoderTower):
    """`Dinov2Model`, `Dinov2WithRegistersModel`: [CLS], registers, then the patches."""

    def prefix(self, tower: nn.Module) -> int:
        config: Any = tower.config
        return 1 + getattr(config, "num_register_tokens", 0)


def _refuse_padding(mask: Tensor | None) -> None:
    """Attention is read of all patches, of which padded pictures hold some that are not there."""
    if mask is not None and not bool(mask.all()):
        raise UnsupportedError(
            "pictures with fewer patches than others of the batch are not read; give pictures of "
            "one shape, one at a time, or max_num_patches that all of them fill"
        )


def _inner(tower: nn.Module) -> Any:
    """What has the encoder."""
    return getattr(tower, "vision_model", tower)


def _pool(tower: nn.Module) -> nn.Module | None:
    """The attention of SigLIP's pooling head, whose query is a learned probe."""
    head = getattr(_inner(tower), "head", None)
    pool: nn.Module | None = None if head is None else head.attention
    return pool


class _Taps(NotCopyable):
    """Hooks of one installation."""

    def __init__(
        self,
        tower: nn.Module,
        signals: frozenset[Signal],
        observation: Observation,
        feature_layer: int,
        prefix: int,
    ) -> None:
        self.tower = tower
        self.calls = calls_of(tower)
        self.layers = part(_inner(tower), "blocks", "encoder.layers", "encoder.layer", "layers")
        self.observation = observation
        self.prefix = prefix
        self.reading = TowerReading(signals, observation, feature_layer, len(self.layers))
        self.tapped: list[tuple[Any, nn.Module, nn.Module]] = []

    def install(self) -> Iterator[Removable]:
        yield self.tower.register_forward_pre_hook(self.begin, with_kwargs=True)
        for number, kinds in self.reading.kinds().items():
            block = part(self.layers[number], "attention", "self_attn", "attention")
            self.tapped.append((block, block.q_proj, block.k_proj))
            heads = part(block, "number of heads", "num_heads", "num_attention_heads")
            tap = _LayerTap(self, number, heads, frozenset(kinds))
            yield block.q_proj.register_forward_hook(tap.query)
            yield block.k_proj.register_forward_hook(tap.key)
        yield self.layers[self.reading.feature_layer].register_forward_hook(self.features)
        pool = _pool(self.tower)
        if pool is not None and PoolAttention() in self.reading.wanted:
            yield pool.register_forward_pre_hook(self.pool)
        yield self.tower.register_forward_hook(self.finish, always_call=False)

    def begin(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for block, query, key in self.tapped:
            if block.q_proj is not query or block.k_proj is not key:
                raise AttachError(
                    f"q_proj or k_proj of the {type(tower).__name__} was replaced while it is "
                    "attached or observed (adapters put in or merged?), so its attention would be "
                    "read without what changed; detach first, and attach again"
                )
        call = self.calls(args, kwargs)
        _refuse_padding(call.pixel_mask)
        self.reading.begin(call.pixels)

    def features(self, layer: nn.Module, args: object, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self.reading.features(hidden[:, self.prefix :])

    @torch.no_grad()
    def pool(self, attention: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.observation.running:
            row = QueryKeyMaps.of(attention).first_row(args[0].detach(), args[1].detach())
            self.observation.scratch[PoolAttention] = row

    def finish(self, tower: nn.Module, args: object, output: object) -> None:
        self.reading.finish()


@dataclass(eq=False)
class _LayerTap(NotCopyable):
    """Hooks of one attention block: what is read is computed in the later of the two.

    Signals take no part in autograd, and a layer that gradient checkpointing runs once more, long
    after the tower is done, is not observed again.
    """

    taps: _Taps
    number: int
    heads: int
    kinds: frozenset[type[Signal]]

    def query(self, projection: nn.Module, args: object, output: Tensor) -> None:
        if self.taps.observation.running:
            # Of the queries, [CLS] is enough for its row.
            whole = {ReceivedAttention, GivenAttention} & self.kinds
            self.note("query", projection, output.detach() if whole else output.detach()[:, :1])

    def key(self, projection: nn.Module, args: object, output: Tensor) -> None:
        if self.taps.observation.running:
            self.note("key", projection, output.detach())

    def note(self, name: str, projection: nn.Module, output: Tensor) -> None:
        """Keep `(batch, tokens, heads * channels)`; with queries and keys there, read them."""
        refuse_split_channels(projection, output)
        scratch, number = self.taps.observation.scratch, self.number
        split = "batch tokens (heads channels) -> batch heads tokens channels"
        scratch[name, number] = rearrange(output, split, heads=self.heads)
        if ("query", number) in scratch and ("key", number) in scratch:
            query, keys = scratch.pop(("query", number)), scratch.pop(("key", number))
            read_block(scratch, number, self.kinds, query, keys, self.taps.prefix)
