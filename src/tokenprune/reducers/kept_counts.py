"""Kept counts per row of a batch, and the tokens that a reducer may touch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from einops import reduce
from torch import Tensor

from ..budget import Keep
from ..fields import check_choice, check_read
from ..metric import moderate
from ..signals import Keys, Signal, Signals
from ..to_device import numbers_on
from ..tokens import VisualTokens

Metric: TypeAlias = Literal["features", "keys"]
"""What similarity is measured on: the features, or the keys of a vision layer (head mean)."""


def kept_counts(budget: Keep, tokens: VisualTokens) -> tuple[int, ...]:
    """Tokens that stay per row: the budget, or all protected ones where these are more."""
    return tuple(
        max(budget.count(real), protected)
        for real, protected in zip(tokens.lengths, tokens.protected_lengths, strict=True)
    )


@dataclass(frozen=True, eq=False)
class Free:
    """The tokens that may be dropped or merged: real ones that are not protected.

    Attributes:
        mask: `(batch, tokens)` bool.
        lengths: how many there are per row.
    """

    mask: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, tokens: VisualTokens) -> Free:
        """The free tokens of each row."""
        lengths = tuple(minus(tokens.lengths, tokens.protected_lengths))
        return cls(tokens.mask & ~tokens.protected, lengths)

    def slots(self) -> Tensor:
        """`(batch, most free tokens)` int64: the slots of the free tokens, ascending, then others.

        Row `b` has `lengths[b]` of them.
        """
        batch, tokens = self.mask.shape
        if all(length == tokens for length in self.lengths):
            return torch.arange(tokens, device=self.mask.device).expand(batch, tokens)
        return marked_first(self.mask)[:, : max(self.lengths, default=0)]


def marked_first(marked: Tensor) -> Tensor:
    """`(batch, tokens)` int64: the slots where `marked` is True, ascending, then the others."""
    return torch.argsort(marked.logical_not().to(torch.uint8), dim=1, stable=True)


def ranked(scores: Tensor, tokens: VisualTokens) -> Tensor:
    """`(batch, tokens)` int64: slots in the order in which they deserve to stay.

    Protected ones, then real ones by score, lowest index first among equals, then padding.
    """
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    if any(tokens.protected_lengths):
        order = _first(order, tokens.protected)
    if any(real < scores.shape[1] for real in tokens.lengths):
        order = _first(order, tokens.mask)
    return order


def _first(order: Tensor, marked: Tensor) -> Tensor:
    """`order` with the marked slots moved to the front, else unchanged."""
    return order.gather(1, marked_first(marked.gather(1, order)))


def first_of(order: Tensor, counts: Sequence[int]) -> Tensor:
    """`(batch, tokens)` bool: True at the first `counts[b]` slots of row `b` of `order`."""
    batch, tokens = order.shape
    rank = torch.arange(tokens, device=order.device).expand(batch, tokens)
    chosen = torch.zeros(batch, tokens, dtype=torch.bool, device=order.device)
    return chosen.scatter_(1, order, rank < column(counts, order.device))


def column(numbers: Sequence[int], device: torch.device) -> Tensor:
    """`(batch, 1)` int64: one number per row."""
    return numbers_on(device, numbers)[:, None]


def minus(some: Sequence[int], others: Sequence[int]) -> list[int]:
    """One number per row: that of `some` less that of `others`."""
    return [one - other for one, other in zip(some, others, strict=True)]


def check_metric(metric: str, layer: int, default: int) -> None:
    """Refuse an unknown metric, and a layer where no keys are read.

    Args:
        metric: what similarity is measured on.
        layer: the layer whose keys are read.
        default: what `layer` is where nobody gave it.
    """
    check_choice("metric", metric, get_args(Metric))
    if metric == "features":
        check_read("layer", layer, default, "metric='features' reads no keys", "metric='keys'")


def metric_signals(metric: Metric, layer: int) -> frozenset[Signal]:
    """What `metric_of` reads."""
    return frozenset({Keys(layer)} if metric == "keys" else ())


def metric_of(metric: Metric, layer: int, tokens: VisualTokens, signals: Signals) -> Tensor:
    """`(batch, tokens, channels)`: what similarity is measured on, zero on padding."""
    if metric == "features":
        return features_of(tokens)
    keys = signals[Keys(layer)].float()
    mean = reduce(keys, "batch heads tokens channels -> batch tokens channels", "mean")
    return _moderate(mean, tokens)


def features_of(tokens: VisualTokens) -> Tensor:
    """`(batch, tokens, channels)`: the features as similarity is measured on, zero on padding."""
    return _moderate(tokens.features, tokens)


def _moderate(x: Tensor, tokens: VisualTokens) -> Tensor:
    if any(real < x.shape[1] for real in tokens.lengths):
        x = torch.where(tokens.mask[:, :, None], x, 0)
    return moderate(x)
