"""Vision towers of open_clip: its own ViTs and CoCa, and ViTs of timm (EVA, SigLIP and others)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.adapter import TowerAdapter
from tokenprune.errors import UnsupportedError
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

from ..kit.attention_rows import joint_attention
from ..kit.query_key_maps import QueryKeyMaps
from ..kit.tower_reading import TowerReading
from .rotary import RotaryEmbedding


@dataclass(frozen=True, eq=False)
class Vit:
    """Parts of a vision transformer (ViT), whichever library wrote it.

    Attributes:
        name: name of its class, for messages.
        blocks: the layers, each with an `attn` that gets the normalised tokens.
        prefix: tokens before the patches ([CLS], registers).
        has_cls: whether the first of them is [CLS].
        batch_first: whether blocks take `(batch, tokens, channels)` or `(tokens, batch, channels)`.
        pool: attention whose first query gathers the patches at the end, or None.
        needs_patches: whether the end of the tower can do nothing without patches.
        dropout: the module that drops patches in training, or None.
        runner: the module whose `grad_checkpointing` says that blocks run once more in backward.
    """

    name: str
    blocks: tuple[nn.Module, ...]
    prefix: int
    has_cls: bool
    batch_first: bool
    pool: nn.Module | None
    needs_patches: bool
    dropout: nn.Module | None
    runner: nn.Module

    @classmethod
    def of(cls, tower: nn.Module) -> Vit:
        """What `tower`, a `model.visual`, is made of.

        Raises:
            UnsupportedError: it has no tokens, or attention that cannot be read.
        """
        made = _of_timm(tower) if hasattr(tower, "trunk") else _of_open_clip(tower)
        for block in made.blocks:
            attention = getattr(block, "attn", None)
            if attention is None:
                raise UnsupportedError(
                    f"{made.name} has blocks ({type(block).__name__}) without a part called attn"
                )
            try:
                QueryKeyMaps.of(attention)
            except UnsupportedError as error:
                raise UnsupportedError(f"{made.name} is not supported: {error}") from error
        return made

    @property
    def block_signals(self) -> frozenset[type[Signal]]:
        """What its blocks can give."""
        common: frozenset[type[Signal]] = frozenset({Keys, ReceivedAttention, GivenAttention})
        return common | {ClsAttention, JointClsAttention} if self.has_cls else common

    def check_call(self) -> None:
        """Refuse a pass in which patches are missing at random."""
        dropout = self.dropout
        if dropout is not None and dropout.training:
            raise UnsupportedError(
                f"{self.name} is in training mode and drops patches at random before its blocks, "
                "so tokens have no known place; call model.eval()"
            )

    def check_mask(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse blocks that are called with a mask, which nothing here looks at."""
        if kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
            raise UnsupportedError(
                f"{self.name} runs with an attention mask, under which its attention cannot be "
                "read nor its tokens be taken out"
            )

    def patches(self, hidden: Tensor) -> Tensor:
        """`(batch, tokens, channels)` of what a block gets or gives."""
        return self.batched(hidden)[:, self.prefix :]

    def batched(self, hidden: Tensor) -> Tensor:
        """What a block gets, batch first; applied twice it is what it was."""
        return hidden if self.batch_first else hidden.transpose(0, 1)


class OpenClipTowerAdapter(TowerAdapter):
    """`model.visual` of an open_clip model."""

    def provides(self, tower: nn.Module) -> frozenset[type[Signal]]:
        vit = Vit.of(tower)
        return vit.block_signals | ({PoolAttention} if vit.pool is not None else set())

    def install(
        self,
        tower: nn.Module,
        signals: frozenset[Signal],
        observation: Observation,
        feature_layer: int,
    ) -> Iterator[Removable]:
        vit = Vit.of(tower)
        reading = TowerReading(signals, observation, feature_layer, len(vit.blocks))
        hooks = _TowerHooks(vit, reading)
        yield tower.register_forward_pre_hook(hooks.begin, with_kwargs=True)
        yield vit.blocks[0].register_forward_pre_hook(hooks.count)
        for number, kinds in reading.kinds().items():
            yield from read_block(vit, number, kinds, observation)
        yield vit.blocks[reading.feature_layer].register_forward_hook(hooks.features)
        if vit.pool is not None and any(isinstance(s, PoolAttention) for s in signals):
            pool = _PoolTap(observation)
            yield vit.pool.register_forward_pre_hook(pool.before)
        yield tower.register_forward_hook(hooks.finish, always_call=True)


class _TowerHooks(NotCopyable):
    """Hooks of one installation that say when a pass starts and ends."""

    def __init__(self, vit: Vit, reading: TowerReading) -> None:
        self.vit = vit
        self.reading = reading

    def begin(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.vit.check_call()
        self.reading.begin(pixels_of(args, kwargs))

    def count(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        if self.reading.observation.running:
            batch, tokens, _ = self.vit.patches(args[0]).shape
            self.reading.observation.scratch["entering"] = args[0].new_empty(batch, tokens, 0)

    def features(self, block: nn.Module, args: object, output: Tensor) -> None:
        self.reading.features(self.vit.patches(output))

    def finish(self, tower: nn.Module, args: object, output: object) -> None:
        if output is None:  # an exception
            self.reading.observation.forget()
            return
        scratch = self.reading.observation.scratch
        entered, left = scratch["entering"].shape[1], scratch["features"].shape[1]
        if entered != left:
            self.reading.observation.forget()
            raise UnsupportedError(
                f"{self.vit.name} is attached and reduces its patches from {entered} to {left}, so "
                "what is observed has no known place; detach it first, or observe another copy"
            )
        self.reading.finish()


def pixels_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The pictures that a tower is called with."""
    pixels: Tensor = args[0] if args else next(iter(kwargs.values()))
    return pixels


def read_block(
    vit: Vit, number: int, kinds: set[type[Signal]], observation: Observation
) -> Iterator[Removable]:
    """Compute signals of one block whenever it runs, into `observation.scratch`.

    They are found there under (kind, number). Gives the handles.
    """
    attention: Any = vit.blocks[number].attn
    tap = _BlockTap(vit, number, frozenset(kinds), observation)
    yield attention.register_forward_pre_hook(tap.before, with_kwargs=True)


@dataclass(frozen=True, eq=False)
class _BlockTap(NotCopyable):
    """Hook before the attention of one block.

    Only its input is looked at: inside of `nn.MultiheadAttention` hooks do not run on the native
    path, and to ask it for weights would take it off that path and change what it returns.
    """

    vit: Vit
    number: int
    kinds: frozenset[type[Signal]]
    observation: Observation

    @torch.no_grad()
    def before(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.observation.running:
            return
        self.vit.check_mask(kwargs)
        x = self.vit.batched(args[0] if args else next(iter(kwargs.values()))).detach()
        made, prefix, rope = QueryKeyMaps.of(attention), self.vit.prefix, kwargs.get("rope")
        turn = None
        if rope is not None:
            half = bool(getattr(attention, "rotate_half", False))
            turn = RotaryEmbedding(rope, getattr(attention, "num_prefix_tokens", prefix), half)
        scratch, number = self.observation.scratch, self.number
        if ClsAttention in self.kinds:
            scratch[ClsAttention, number] = made.first_row(x, x, turn)[:, :, prefix:]
        if JointClsAttention in self.kinds:
            row = joint_attention(made.first_products(x, x, turn))
            scratch[JointClsAttention, number] = row[:, prefix:]
        if Keys in self.kinds:
            scratch[Keys, number] = made.keys(x)[:, :, prefix:]
        if {ReceivedAttention, GivenAttention} & self.kinds:
            received, given = made.margins(x, prefix, turn)
            scratch[ReceivedAttention, number] = received
            scratch[GivenAttention, number] = given


@dataclass(frozen=True, eq=False)
class _PoolTap(NotCopyable):
    """Hook before an attention pool, for the attention row of its first query."""

    observation: Observation

    @torch.no_grad()
    def before(self, pool: nn.Module, args: tuple[Any, ...]) -> None:
        if not self.observation.running:
            return
        made, scratch = QueryKeyMaps.of(pool), self.observation.scratch
        if made.latent is not None:  # timm's: the pool gets patches and brings its query
            asking, context = made.latent, args[0].detach()
        else:  # open_clip's: the attention inside of the pool gets both
            asking, context = args[0].detach(), args[1].detach()
        row = made.first_row(asking.expand(context.shape[0], -1, -1), context)
        scratch[PoolAttention] = row[:, :, -scratch["entering"].shape[1] :]


def _of_open_clip(tower: Any) -> Vit:
    transformer, pool = tower.transformer, None
    if tower.attn_pool is not None:
        kind = getattr(tower, "attn_pool_type", "")
        if tower.attn_pool_contrastive is None and tower.pool_type == "tok":
            pool = tower.attn_pool.attn
        elif kind == "parallel":
            pool = tower.attn_pool_contrastive.attn
    dropout = tower.patch_dropout
    return Vit(
        name=type(tower).__name__,
        blocks=tuple(transformer.resblocks),
        prefix=1,
        has_cls=True,
        batch_first=transformer.batch_first,
        pool=pool,
        needs_patches=tower.attn_pool is None and tower.pool_type == "avg",
        dropout=None if isinstance(dropout, nn.Identity) else dropout,
        runner=transformer,
    )


def _of_timm(tower: Any) -> Vit:
    trunk = tower.trunk
    name = f"{type(tower).__name__} with {type(trunk).__name__}"
    if not hasattr(trunk, "blocks") or not hasattr(trunk, "num_prefix_tokens"):
        raise UnsupportedError(
            f"{name} is no plain ViT: {type(trunk).__name__} has no sequence of patches that all "
            "its layers share, so there are no tokens to score or to drop; supported are ViTs, "
            "such as 'ViT-B-32', 'EVA02-B-16' or 'ViT-B-16-SigLIP'"
        )
    pool = getattr(trunk, "attn_pool", None)
    readable = getattr(pool, "latent", None) is not None and getattr(pool, "pool", "") == "token"
    dropout = getattr(trunk, "patch_drop", None)
    return Vit(
        name=name,
        blocks=tuple(trunk.blocks),
        prefix=trunk.num_prefix_tokens,
        has_cls=getattr(trunk, "cls_token", None) is not None,
        batch_first=True,
        pool=pool if readable else None,
        needs_patches=trunk.num_prefix_tokens == 0
        or (pool is None and trunk.global_pool not in ("token", "")),
        dropout=None if isinstance(dropout, nn.Identity) else dropout,
        runner=trunk,
    )
