"""Pictures to compare on, and a way to run a reducer that also checks it among other rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tokenprune import Keys, Plan, Reducer, Signal, Signals, VisualTokens

CHANNELS = 6

KINDS = ("normal", "whole", "repeated", "zeros", "half", "bfloat")


def features(kind: str, tokens: int, seed: int) -> Tensor:
    """`(tokens, channels)` of a kind: plain, tied, duplicated, zero, or in low precision."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, CHANNELS, generator=generator)
    if kind == "whole":
        x = torch.randint(-2, 3, (tokens, CHANNELS), generator=generator).float()
    if kind == "repeated":
        x = x[torch.randint(max(tokens // 3, 1), (tokens,), generator=generator)]
    if kind == "zeros":
        x = x * (torch.rand(tokens, 1, generator=generator) < 0.5)
    return x.to({"half": torch.float16, "bfloat": torch.bfloat16}.get(kind, torch.float32))


@dataclass(frozen=True)
class Picture:
    """One row of tokens, with what a reducer may ask for."""

    features: Tensor
    scores: Tensor | None = None
    sizes: Tensor | None = None
    signals: dict[Signal, Tensor] = field(default_factory=dict)

    @classmethod
    def draw(cls, kind: str, tokens: int, seed: int) -> Picture:
        """Features of a kind, scores with ties, sizes, and keys of two heads."""
        generator = torch.Generator().manual_seed(seed + 1000)
        return cls(
            features(kind, tokens, seed),
            torch.randint(0, tokens, (tokens,), generator=generator).float(),
            torch.randint(1, 4, (tokens,), generator=generator).float(),
            {Keys(-2): features("normal", 2 * tokens, seed + 1).reshape(1, 2, tokens, CHANNELS)},
        )

    @property
    def x(self) -> np.ndarray:
        """The features in float64."""
        return self.features.double().numpy()


def matrix(reducer: Reducer, picture: Picture, other_seed: int = 5) -> np.ndarray:
    """The plan for `picture` as a matrix, the same alone and between padding and other rows."""
    tokens = len(picture.features)
    alone = _plan(reducer, picture, torch.arange(tokens), tokens)
    generator = torch.Generator().manual_seed(other_seed)
    slots = torch.randperm(tokens + 5, generator=generator)[:tokens].sort().values
    among = _plan(reducer, picture, slots, tokens + 5)
    kept = alone.lengths[0]
    assert among.lengths[1] == kept
    assert torch.equal(slots[alone.anchors[0]], among.anchors[1, :kept])
    assert torch.equal(alone.dense()[0], among.dense()[1, :kept][:, slots])
    assert not among.dense()[1, kept:].any()
    reduced = alone(picture.features[None])
    assert reduced.isfinite().all()
    expected = alone.dense()[0].double() @ picture.features.double()
    assert torch.allclose(reduced[0].double(), expected, rtol=1e-2, atol=1e-2)
    return alone.dense()[0].double().numpy()


def _plan(reducer: Reducer, picture: Picture, slots: Tensor, width: int) -> Plan:
    """Alone, or as the second of two rows with `width` slots, padded with NaN."""
    tokens = len(picture.features)
    if width == tokens:
        given = VisualTokens.of(
            picture.features[None],
            sizes=None if picture.sizes is None else picture.sizes[None],
        )
        scores = None if picture.scores is None else picture.scores[None]
        return reducer.plan(given, scores, Signals(picture.signals))
    rows = torch.zeros(2, width, CHANNELS, dtype=picture.features.dtype).fill_(torch.nan)
    rows[0] = features("normal", width, 77).to(rows.dtype)
    rows[1, slots] = picture.features
    mask = torch.ones(2, width, dtype=torch.bool)
    mask[1] = False
    mask[1, slots] = True
    patches = torch.arange(width).repeat(2, 1)
    patches[1, slots] = torch.arange(tokens)
    sizes = torch.ones(2, width)
    if picture.sizes is not None:
        sizes[1, slots] = picture.sizes
    scores = None
    if picture.scores is not None:
        scores = torch.arange(width).float().repeat(2, 1)
        scores[1, slots] = picture.scores
    signals = {}
    for signal, answer in picture.signals.items():
        axis = signal.axes.split().index("tokens")
        spread = answer.new_full(
            [2, *(width if i == axis else n for i, n in enumerate(answer.shape) if i)], 0.01
        )
        spread[1] = spread[1].index_copy(axis - 1, slots, answer[0])
        signals[signal] = spread
    given = VisualTokens.of(rows, mask=mask, patches=patches, sizes=sizes)
    return reducer.plan(given, scores, Signals(signals))
