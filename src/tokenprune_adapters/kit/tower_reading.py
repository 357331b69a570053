"""Reading of a vision tower: signals that are wanted, and the answers of one pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokenprune.errors import ShapeError, UnsupportedError
from tokenprune.hooks import NotCopyable
from tokenprune.observation import Observation
from tokenprune.signals import (
    ClsAttention,
    GivenAttention,
    JointClsAttention,
    Keys,
    PoolAttention,
    ReceivedAttention,
    Signal,
    resolve_layers,
)
from tokenprune.tokens import VisualTokens

from .attention_rows import attention, attention_margins, joint_attention, products
from .fingerprint import ids_of

Answers = dict[Signal, Tensor]


class TowerReading(NotCopyable):
    """Signals that are wanted of a tower's layers, and their answers, pass after pass.

    Signals take no part in autograd.

    Args:
        signals: signals that are wanted.
        observation: where the answers go.
        feature_layer: Python-style index of the block whose output is the features.
        count: number of blocks of the tower.
    """

    def __init__(
        self,
        signals: frozenset[Signal],
        observation: Observation,
        feature_layer: int,
        count: int,
    ) -> None:
        if not -count <= feature_layer < count:
            raise ShapeError(f"feature_layer={feature_layer} is not one of {count} layers")
        self.observation = observation
        self.feature_layer = feature_layer % count
        self.wanted = {s: layers_of(s, self.feature_layer, count) for s in signals}

    def kinds(self) -> dict[int, set[type[Signal]]]:
        """Kinds of signals that are wanted of each layer, by its number."""
        found: dict[int, set[type[Signal]]] = {}
        for signal, layers in sorted(self.wanted.items(), key=lambda entry: entry[1]):
            for layer in layers:
                found.setdefault(layer, set()).add(type(signal))
        return found

    def begin(self, pixels: Tensor) -> None:
        """Start a pass over `(batch, ...)` floating-point pixels."""
        self.observation.begin()
        self.observation.scratch["pixels"] = pixels

    def features(self, patches: Tensor) -> None:
        """Note the features of this pass, `(batch, tokens, channels)` without [CLS]."""
        # A layer that gradient checkpointing runs once more, long after its tower, is not noted.
        if self.observation.running:
            self.observation.scratch["features"] = patches.detach()

    def finish(self, whole: Callable[[Answers], Answers] | None = None) -> None:
        """Publish the pass, which is complete.

        Args:
            whole: function that makes answers of all heads from those that this process computed,
                where it did not compute all; None where it did.
        """
        scratch = self.observation.scratch
        features = scratch["features"]
        tokens = VisualTokens.of(features, ids=ids_of(scratch["pixels"], features.device))
        found = answers(self.wanted, scratch)
        self.observation.finish(tokens, found if whole is None else whole(found))


def layers_of(signal: Signal, feature_layer: int, count: int) -> tuple[int, ...]:
    """Absolute numbers of the blocks that `signal` asks about; none where it asks about no block.

    Args:
        signal: signal of a vision tower.
        feature_layer: absolute number of the block whose output is the features.
        count: number of blocks.
    """
    if isinstance(signal, PoolAttention):
        return ()
    asked = (signal.layer,) if isinstance(signal, Keys) else getattr(signal, "layers", ())
    return resolve_layers(asked, feature_layer, count)


def read_block(
    scratch: dict[object, Tensor],
    number: int,
    kinds: frozenset[type[Signal]],
    query: Tensor,
    keys: Tensor,
    prefix: int,
    whole: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Leave in `scratch` what is wanted of one attention block.

    Args:
        scratch: where `answers` finds it.
        number: number of the block.
        kinds: kinds of signals that are wanted of it.
        query: `(batch, heads, queries, channels)`, [CLS] first where its row is wanted.
        keys: `(batch, heads, prefix + tokens, channels)`.
        prefix: number of tokens before the patches.
        whole: function that makes `(batch, all heads, tokens)` of the same with the heads of this
            process; None where it has all.
    """
    if Keys in kinds:
        scratch[Keys, number] = keys[:, :, prefix:]
    if ClsAttention in kinds:
        scratch[ClsAttention, number] = attention(query[:, :, :1], keys)[:, :, 0, prefix:]
    if JointClsAttention in kinds:
        made = products(query[:, :, :1], keys)[:, :, 0]
        row = joint_attention(made if whole is None else whole(made))
        scratch[JointClsAttention, number] = row[:, prefix:]
    if {ReceivedAttention, GivenAttention} & kinds:
        received, given = attention_margins(query, keys, prefix)
        scratch[ReceivedAttention, number] = received
        scratch[GivenAttention, number] = given


def answers(wanted: dict[Signal, tuple[int, ...]], scratch: dict[object, Tensor]) -> Answers:
    """Answers to signals, from what hooks have left in `scratch`.

    They leave it under (kind of signal, number of the layer), or under the kind alone.
    """
    found: Answers = {}
    for signal, layers in wanted.items():
        kind = type(signal)
        missing = [layer for layer in layers if (kind, layer) not in scratch]
        if missing:
            raise UnsupportedError(
                f"no hook has read {kind.__name__} of block {missing[0]}; torch.compile may run "
                "the code of a block without hooks for it: keep the tower out of that, by "
                "tower.forward = torch.compiler.disable(tower.forward)"
            )
        if "layers" in signal.axes.split():
            found[signal] = torch.stack([scratch[kind, layer] for layer in layers], dim=1)
        else:
            found[signal] = scratch[(kind, *layers) if layers else kind]
    return found
