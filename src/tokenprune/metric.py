"""Cosines and distances that come out the same whatever else is in the batch.

A matrix product rounds differently when its shape changes, so the same two tokens could be a hair
more or less similar alone than in a batch, or than the same tokens next to padding, and exact ties
(duplicates, blank patches) would break by that noise. So products are taken in float64 and rounded
to a grid that is much coarser than their error and much finer than a difference that matters.
"""

from __future__ import annotations

import torch
from torch import Tensor

_COSINE_GRID = 2.0**24
_HALF_GRID = 2.0**19  # squares of this, four times, are 2^40


def wide(x: Tensor) -> Tensor:
    """`x` in float64; in float32 where the device has nothing wider (mps)."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosines `(batch, m, n)` of rows `(batch, m, channels)` with rows `(batch, n, channels)`.

    Float32, multiples of 2^-24. A zero row has cosine 0 with everything.

    >>> cosine(torch.tensor([[[3.0, 4.0], [0.0, 0.0]]]), torch.tensor([[[8.0, 6.0]]]))
    tensor([[[0.9600],
             [0.0000]]])
    """
    a, b = wide(a), wide(b)
    return _rounded(a @ b.mT, _lengths(a), _lengths(b))


def cosine_to_all(x: Tensor, slots: Tensor) -> Tensor:
    """`cosine` of the rows at `(batch, m)` int64 slots with all rows of `(batch, n, channels)`."""
    x = wide(x)
    length = _lengths(x)
    row = torch.arange(len(x), device=x.device)[:, None]
    return _rounded(x[row, slots] @ x.mT, length.gather(1, slots), length)


def _lengths(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=2)
    return length.clamp_(min=torch.finfo(x.dtype).tiny)


def _rounded(product: Tensor, length_a: Tensor, length_b: Tensor) -> Tensor:
    """Cosines on their grid, from `(batch, m, n)` products and the lengths of rows and columns."""
    product.div_(length_a[:, :, None]).div_(length_b[:, None, :])
    return product.mul_(_COSINE_GRID).round_().div_(_COSINE_GRID).float()


def squared_distances(x: Tensor, real: Tensor) -> Tensor:
    """Squared Euclidean distances of all pairs of tokens of a row, as whole numbers.

    The unit is a power of four, between 2^-36 and 2^-40 of the row's largest possible distance.
    Sums of whole numbers are exact in any order, so what is decided by them is the same on every
    device and in every batch.

    Args:
        x: `(batch, tokens, channels)` features.
        real: `(batch, tokens)` bool, the tokens that matter; others mean nothing.

    Returns:
        `(batch, tokens, tokens)` float64, whole numbers in [0, 2^40].
    """
    x = wide(moderate(torch.where(real[:, :, None], x, 0)))
    # Distances do not change with the origin; one among the tokens keeps cancellation small.
    origin = real.to(torch.uint8).argmax(1, keepdim=True)[:, :, None].expand(-1, -1, x.shape[2])
    x = (x - x.gather(1, origin)).mul_(real[:, :, None])
    longest = torch.linalg.vector_norm(x, dim=2).amax(1)
    mantissa, _ = torch.frexp(longest)
    power = torch.where(longest > 0, longest / mantissa, 1)  # of two, and exact
    x = x.mul_(_HALF_GRID / power[:, None, None])
    norm = x.square().sum(2)
    return _gram(x).mul_(-2).add_(norm[:, :, None]).add_(norm[:, None, :]).round_().clamp_(min=0)


def _gram(x: Tensor) -> Tensor:
    """`x @ x.mT`, a quarter of which is copied because it is symmetric."""
    half = x.shape[1] // 2
    gram = x.new_empty(x.shape[0], x.shape[1], x.shape[1])
    gram[:, :half] = x[:, :half] @ x.mT
    gram[:, half:, :half] = gram[:, :half, half:].mT
    gram[:, half:, half:] = x[:, half:] @ x[:, half:].mT
    return gram


def moderate(x: Tensor) -> Tensor:
    """`(batch, tokens, channels)`, each row scaled if squares could overflow (float64 alone)."""
    if x.dtype != torch.float64:
        return x
    largest = x.abs().amax((1, 2), keepdim=True)
    mantissa, _ = torch.frexp(largest)
    return x * torch.where(largest > 0, mantissa / largest, 1)
