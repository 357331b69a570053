"""Attention of a tower that a `Tower` describes, per slot of the features that enter the LLM."""

from __future__ import annotations

import operator
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenprune.errors import UnsupportedError
from tokenprune.hooks import NotCopyable, Removable
from tokenprune.signals import (
    ClsAttention,
    GivenAttention,
    JointClsAttention,
    Keys,
    ReceivedAttention,
    Signal,
)

from ..kit.tower_reading import answers, layers_of, read_block
from .anatomy import configured_layer, part
from .family import Encoded, Tower
from .names import Call, Hooked, calls_of
from .split_heads import refuse_split_channels

_ROTATE, _ROTATE_PACKED = "apply_rotary_pos_emb_vision", "apply_rotary_pos_emb"


def given_by(tower: Tower | None) -> frozenset[type[Signal]]:
    """The signals that are read of a tower."""
    if tower is None:
        return frozenset()
    found: set[type[Signal]] = {ReceivedAttention, GivenAttention, Keys}
    if tower.prefix:
        found |= {ClsAttention, JointClsAttention}
    return frozenset(found)


class ReadTower(NotCopyable):
    """Hooks on the blocks that signals ask about.

    Args:
        core: the model without its head.
        tower: where its tower's attention is read.
        signals: what is wanted.

    Raises:
        UnsupportedError: a part is not where the family says.
    """

    def __init__(self, core: Any, tower: Tower, signals: frozenset[Signal]) -> None:
        self.core = core
        self.tower = tower
        kind = core.config.vision_config.model_type
        if tower.kinds and kind not in tower.kinds:
            raise UnsupportedError(
                f"attention of this model is read of a tower of the type {' or '.join(tower.kinds)}"
                f", got {kind}; rank by features (diverse, similarity) or fastv"
            )
        self.blocks = part(core, "blocks of the tower", *tower.blocks)
        count = len(self.blocks)
        last = configured_layer(core.config, tower.layer) % count
        self.wanted = {each: layers_of(each, last, count) for each in signals}
        self._local = threading.local()

    def install(self) -> Iterator[Removable]:
        """Yield the handles."""
        for number in sorted({each for layers in self.wanted.values() for each in layers}):
            kinds = {type(each) for each, layers in self.wanted.items() if number in layers}
            attention = operator.attrgetter(self.tower.attention)(self.blocks[number])
            tap = _Tap(self, number, attention, frozenset(kinds))
            if self.tower.fused or self.tower.packed is not None:
                yield attention.register_forward_pre_hook(tap.enter, with_kwargs=True)
            if self.tower.fused:
                projection = getattr(attention, self.tower.fused)
                yield projection.register_forward_hook(tap.fused)
            else:
                for name, hook in ((self.tower.query, tap.query), (self.tower.key, tap.key)):
                    yield getattr(attention, name).register_forward_hook(hook)

    @property
    def found(self) -> dict[object, Any] | None:
        """What hooks of this thread's pass hand to each other; None outside of one."""
        found: dict[object, Any] | None = getattr(self._local, "found", None)
        return found

    def begin(self, call: Call) -> None:
        """Forget the previous pass of this thread; `call` is that of the method that encodes."""
        self._local.found = {}
        if self.tower.packed is not None:
            self._local.found["lengths"] = list(self.tower.packed(self.core, call))

    def take(self, encoded: Encoded) -> dict[Signal, Tensor]:
        """`(slots, ...)` of each signal, its other axes in order: means over a slot's patches."""
        found, self._local.found = self.found or {}, None
        members = self.tower.members(encoded)
        return {
            signal: flat[members.to(flat.device)].mean(1)
            for signal, flat in answers(self.wanted, found).items()
        }


class _Tap(NotCopyable):
    """Hooks of one block; signals are kept as `(patches of the call, ...)`."""

    def __init__(
        self, read: ReadTower, number: int, attention: Any, kinds: frozenset[type[Signal]]
    ) -> None:
        self.read = read
        self.number = number
        self.kinds = kinds
        self.heads: int = attention.num_heads
        self.calls = calls_of(attention)
        # Beside the attention's own code, which rotates by it.
        name = _ROTATE if read.tower.fused else _ROTATE_PACKED
        self.rotate: Any = getattr(sys.modules[type(attention).__module__], name, None)
        if self.rotate is None and (read.tower.fused or read.tower.packed is not None):
            raise UnsupportedError(f"{type(attention).__name__} does not rotate by {name}")

    def _split(self, module: nn.Module, x: Tensor) -> Tensor:
        refuse_split_channels(module, x)
        return rearrange(x.detach(), "b n (h c) -> b h n c", h=self.heads)

    def query(self, module: nn.Module, args: object, output: Tensor) -> None:
        if self.read.found is not None:
            self.read.found["query", self.number] = self._split(module, output)

    @torch.no_grad()
    def key(self, module: nn.Module, args: object, output: Tensor) -> None:
        found = self.read.found
        if found is None:
            return
        query, key = found.pop(("query", self.number)), self._split(module, output)
        if self.read.tower.packed is None:
            self._note([self._read(query, key)])
            return
        self._keep(rearrange(key, "1 h n c -> n h c"))
        rotary = found.pop(("call", self.number)).rotary
        query, key = self.rotate(query, key, *rotary, unsqueeze_dim=0)
        parts = (x.split(found["lengths"], dim=2) for x in (query, key))
        self._note([self._read(q, k) for q, k in zip(*parts, strict=True)])

    def enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Hooked | None:
        if self.read.found is not None:
            self.read.found["call", self.number] = self.calls(args, kwargs)
        return None

    @torch.no_grad()
    def fused(self, module: nn.Module, args: object, output: Tensor) -> None:
        found = self.read.found
        if found is None:
            return
        refuse_split_channels(module, output)
        call = found.pop(("call", self.number))
        seams, rotary = call.seams, call.rotary
        split = "n (three h c) -> three n h c"
        query, key, _ = rearrange(output.detach(), split, three=3, h=self.heads)
        self._keep(key)
        query, key = self.rotate(query, key, *rotary)
        lengths = seams.diff().tolist()
        pairs = zip(query.split(lengths), key.split(lengths), strict=True)
        self._note([self._read(q.transpose(0, 1)[None], k.transpose(0, 1)[None]) for q, k in pairs])

    def _read(self, query: Tensor, key: Tensor) -> dict[object, Tensor]:
        read: dict[object, Tensor] = {}
        read_block(read, self.number, self.kinds, query, key, self.read.tower.prefix)
        axes = {Keys: "b h n c -> (b n) h c", JointClsAttention: "b n -> (b n)"}
        return {
            kind: rearrange(read[kind, self.number], axes.get(kind, "b h n -> (b n) h"))
            for kind in self.kinds
        }

    def _keep(self, keys: Tensor) -> None:
        """Keep `(patches of the call, heads, channels)` keys before they are rotated."""
        assert self.read.found is not None
        self.read.found[Keys, self.number] = keys

    def _note(self, parts: list[dict[object, Tensor]]) -> None:
        assert self.read.found is not None
        for kind in self.kinds:
            made = torch.cat([each[kind] for each in parts])
            self.read.found.setdefault((kind, self.number), made)
