"""Random numbers without a generator: the same on every device, in any batch."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(seed: int, ids: Tensor, counters: Tensor) -> Tensor:
    """Independent uniform numbers in [0, 1), multiples of 2^-24.

    A counter-based generator: SplitMix64 (Steele, Lea and Flood, 2014) of seed, row and counter.

    Args:
        seed: a non-negative int.
        ids: `(batch,)` int64, which image each row shows.
        counters: `(batch, numbers)` int64, the place of each number in its row's stream.

    Returns:
        `(batch, numbers)` float32.
    """
    row = _mix(_mix(torch.full((), seed % 2**63, dtype=torch.int64, device=ids.device)) ^ ids)
    bits = _mix(row[:, None] ^ _mix(counters))
    numbers: Tensor = (bits & 0xFFFFFF).to(torch.float32) / 2**24
    return numbers


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's output function on int64 that wraps around."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift right: torch's own repeats the sign bit."""
    return torch.bitwise_and(x >> bits, 2 ** (64 - bits) - 1)
