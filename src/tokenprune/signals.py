"""Signals: what a strategy asks of the model, and the mapping in which it finds the answers."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from einops import rearrange
from torch import Tensor

from .errors import MissingSignalError, ShapeError
from .plan import Plan

Layers: TypeAlias = int | tuple[int, ...]
"""An int K: the K layers that end at the layer which produces the features (VTC-CLS). A tuple:
indices of the blocks, Python style, -1 being the last block of the model."""


def check_layers(layers: Layers) -> Layers:
    """`layers` as it may stand in a signal: K >= 1, or a tuple (a list becomes one)."""
    if isinstance(layers, bool) or not isinstance(layers, (int, tuple, list)):
        raise ShapeError(f"layers must be an int K or a tuple of layer indices, got {layers!r}")
    if isinstance(layers, int):
        if layers < 1:
            raise ShapeError(f"layers=K takes the K last layers, K >= 1, got {layers}")
        return layers
    layers = tuple(layers)
    if not layers or len(set(layers)) < len(layers) or not all(isinstance(i, int) for i in layers):
        raise ShapeError(f"layers must be distinct layer indices, at least one, got {layers!r}")
    return layers


def resolve_layers(layers: Layers, feature_layer: int, count: int) -> tuple[int, ...]:
    """Absolute indices of the blocks meant by `layers`, ascending where `layers` is K.

    Args:
        layers: K, or explicit indices.
        feature_layer: absolute index of the block whose output is the features.
        count: blocks of the model.

    Raises:
        ShapeError: more layers than there are up to the feature layer, or an index out of range.

    >>> resolve_layers(3, feature_layer=22, count=24), resolve_layers((-4, 5), 22, 24)
    ((20, 21, 22), (20, 5))
    """
    if isinstance(layers, int):
        if layers > feature_layer + 1:
            raise ShapeError(
                f"layers={layers} asks for {layers} layers, but only {feature_layer + 1} end at "
                f"layer {feature_layer}, which produces the features"
            )
        return tuple(range(feature_layer - layers + 1, feature_layer + 1))
    if any(not -count <= layer < count for layer in layers):
        raise ShapeError(f"layers={layers} asks for a layer outside of the model's {count}")
    return tuple(layer % count for layer in layers)


@dataclass(frozen=True)
class Signal(ABC):
    """Signal: a request for something that a model computes, and the key under which it is read.

    Subclass it, frozen, with `axes`: the einops names of the answer's axes. The axis called
    `tokens`, where there is one, counts the visual tokens alone (no [CLS], no registers).
    """

    axes: ClassVar[str]


@dataclass(frozen=True)
class ClsAttention(Signal):
    """Attention of the [CLS] token to each visual token, per vision layer and head.

    `(batch, layers, heads, tokens)`. Softmax over all keys, [CLS] included; the [CLS] column is
    left out and the rest is NOT renormalised (VTC-CLS, arXiv 2412.05819, eq. 1).
    """

    layers: Layers
    axes: ClassVar[str] = "batch layers heads tokens"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_layers(self.layers))


@dataclass(frozen=True)
class JointClsAttention(Signal):
    """Attention of the [CLS] token to each visual token, as one head over all channels.

    `(batch, layers, tokens)`. Queries and keys of all heads count as those of one head: the sum of
    the heads' products, over the root of all their channels. Softmax over all keys, [CLS]
    included; its column is left out and the rest is not renormalised. This is the attention of
    LLaVA-PruMerge (arXiv 2403.15388). It cannot be told from `ClsAttention`, where heads have been
    through a softmax each and the column of [CLS] is missing, so a tower computes it.
    """

    layers: Layers
    axes: ClassVar[str] = "batch layers tokens"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_layers(self.layers))


@dataclass(frozen=True)
class LastQueryAttention(Signal):
    """Attention of the last real token of the prompt to each visual token, in an LLM layer.

    `(batch, layers, heads, tokens)`. FastV (arXiv 2403.06764); -1 is the latest layer that has run.
    """

    layers: tuple[int, ...] = (-1,)
    axes: ClassVar[str] = "batch layers heads tokens"


@dataclass(frozen=True)
class TextQueryAttention(Signal):
    """Attention of all text tokens after an image to its visual tokens, mean over them, in an LLM.

    `(batch, layers, heads, tokens)`. The wording of FastV's paper (arXiv 2403.06764); -1 is the
    latest layer that has run.
    """

    layers: tuple[int, ...] = (-1,)
    axes: ClassVar[str] = "batch layers heads tokens"


@dataclass(frozen=True)
class Keys(Signal):
    """Attention keys of the visual tokens in one vision layer, before any scaling.

    `(batch, heads, tokens, channels)`, the channels of a head.
    """

    layer: int
    axes: ClassVar[str] = "batch heads tokens channels"


@dataclass(frozen=True)
class ReceivedAttention(Signal):
    """Mean attention that each visual token of a vision tower receives from the visual tokens.

    `(batch, layers, heads, tokens)`, per vision layer and head. Softmax over all keys, [CLS] or
    registers included where there are any; they are left out as queries and as receivers, and the
    rest is not renormalised.
    """

    layers: Layers
    axes: ClassVar[str] = "batch layers heads tokens"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_layers(self.layers))


@dataclass(frozen=True)
class GivenAttention(Signal):
    """Mean attention that each visual token of a vision tower gives to the visual tokens.

    `(batch, layers, heads, tokens)`. The other margin of the matrix of which `ReceivedAttention` is
    one: without [CLS] or registers it is the same for every token.
    """

    layers: Layers
    axes: ClassVar[str] = "batch layers heads tokens"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_layers(self.layers))


@dataclass(frozen=True)
class PoolAttention(Signal):
    """Attention of the probe of an attention-pooling head (SigLIP) to each visual token.

    `(batch, heads, tokens)`.
    """

    axes: ClassVar[str] = "batch heads tokens"


@dataclass(frozen=True)
class AlignedFeatures(Signal):
    """Visual tokens in the space that a model shares between pictures and text (CLIP's).

    `(batch, tokens, channels)`.
    """

    axes: ClassVar[str] = "batch tokens channels"


@dataclass(frozen=True)
class TextFeatures(Signal):
    """Features of the text, one or several per row, in the space of `AlignedFeatures`.

    `(batch, texts, channels)`; rows of zeros are padding.
    """

    axes: ClassVar[str] = "batch texts channels"


class Signals(Mapping[Signal, Tensor]):
    """Mapping of signals to what a model gave. Checks axes; says what is there.

    The axes `batch` and `tokens` are as long in all answers, and `layers` as long as was asked.

    Args:
        answers: what was given.
        beside: signals that were supplied and are left out here, for messages alone.

    Raises:
        ShapeError: an answer has other axes.

    >>> import torch
    >>> Signals({ClsAttention(layers=3): torch.rand(1, 3, 16, 576)})
    Signals({ClsAttention(layers=3): <float32 (1, 3, 16, 576)>})
    """

    def __init__(
        self, answers: Mapping[Signal, Tensor] | None = None, beside: Iterable[Signal] = ()
    ) -> None:
        self._answers = dict(answers or {})
        self._beside = frozenset(beside) - self._answers.keys()
        lengths: dict[str, tuple[int, Signal]] = {}
        for signal, answer in self._answers.items():
            axes = signal.axes.split()
            if not isinstance(answer, Tensor):
                raise ShapeError(
                    f"{signal} must be a tensor with axes ({signal.axes}), got {answer!r:.60}"
                )
            if answer.ndim != len(axes):
                raise ShapeError(
                    f"{signal} must have axes ({signal.axes}), got {tuple(answer.shape)}"
                )
            sizes = dict(zip(axes, answer.shape, strict=True))
            for name in {"batch", "tokens"} & sizes.keys():
                size, first = lengths.setdefault(name, (sizes[name], signal))
                if sizes[name] != size:
                    raise ShapeError(
                        f"{signal} has {sizes[name]} along {name!r}, and {first} has {size}: "
                        "signals of one call describe the same visual tokens"
                    )
            asked = _asked_layers(signal)
            if asked is not None and sizes.get("layers", asked) != asked:
                raise ShapeError(
                    f"{signal} asks for {asked} layers, got {sizes['layers']} in "
                    f"{tuple(answer.shape)}, axes ({signal.axes})"
                )

    def __getitem__(self, signal: Signal) -> Tensor:
        try:
            return self._answers[signal]
        except KeyError:
            if signal in self._beside:
                known = ", ".join(map(repr, self._answers)) or "none"
                raise MissingSignalError(
                    f"{signal} is another step's: a step sees the signals that its property "
                    f"`signals` names, here {known}"
                ) from None
            known = ", ".join(map(repr, [*self._answers, *sorted(self._beside, key=repr)]))
            raise MissingSignalError(
                f"{signal} was not supplied; supplied: {known or 'none'}"
            ) from None

    def __contains__(self, signal: object) -> bool:
        return signal in self._answers

    def __iter__(self) -> Iterator[Signal]:
        return iter(self._answers)

    def __len__(self) -> int:
        return len(self._answers)

    def __repr__(self) -> str:
        """Values of small answers, to be pasted into a test, and shapes of others."""
        shown = [f"{signal!r}: {_shown(answer)}" for signal, answer in self._answers.items()]
        return f"Signals({{{', '.join(shown)}}})" if shown else "Signals()"

    def only(self, wanted: Iterable[Signal]) -> Signals:
        """Those of `wanted` that are there. Reading one of the others says that it was left out."""
        there = {signal: self._answers[signal] for signal in wanted if signal in self._answers}
        return Signals(there, beside=self._answers)

    def check(self, mask: Tensor) -> None:
        """See that every answer is about tokens with `mask`, `(batch, tokens)` bool.

        Raises:
            ShapeError: an answer is about other rows, or another number of tokens.
        """
        for signal, answer in self._answers.items():
            sizes = dict(zip(signal.axes.split(), answer.shape, strict=True))
            for name, size in zip(("batch", "tokens"), mask.shape, strict=True):
                if sizes.get(name, size) != size:
                    raise ShapeError(
                        f"{signal} has {sizes[name]} along {name!r}, where the visual tokens have "
                        f"{size}: {tuple(answer.shape)} with axes ({signal.axes})"
                    )

    def reduce(self, plan: Plan) -> Signals:
        """Every signal put through `plan` on its axis of tokens, for later steps to read."""
        return Signals({**self, **self.along_tokens(plan)})

    def along_tokens(self, change: Callable[[Tensor], Tensor]) -> Signals:
        """Signals that have an axis of tokens, with `change` made along it; others are left out.

        Args:
            change: maps `(batch, tokens, ...)` to a tensor with as many axes, such as a plan does.

        >>> import torch
        >>> rows = Signals({ClsAttention(layers=1): torch.rand(2, 1, 16, 9)})
        >>> rows.along_tokens(lambda x: x[:, :4])[ClsAttention(layers=1)].shape
        torch.Size([2, 1, 16, 4])
        """
        return Signals(
            {
                signal: _along_tokens(signal.axes, answer, change)
                for signal, answer in self._answers.items()
                if "tokens" in signal.axes.split()
            }
        )


def _shown(answer: Tensor) -> str:
    if answer.numel() <= 128 and answer.device.type == "cpu":
        return repr(answer)
    return f"<{str(answer.dtype).removeprefix('torch.')} {tuple(answer.shape)}>"


def _asked_layers(signal: Signal) -> int | None:
    """How many layers `signal` asks for, if it asks for layers."""
    layers = getattr(signal, "layers", None)
    return len(layers) if isinstance(layers, tuple) else layers if isinstance(layers, int) else None


def _along_tokens(axes: str, answer: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    front = " ".join(["batch tokens", *(n for n in axes.split() if n not in ("batch", "tokens"))])
    return rearrange(change(rearrange(answer, f"{axes} -> {front}")), f"{front} -> {axes}")
