"""Copies of what the host knows to a device: a GPU gets them in its turn, and nobody waits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sent(x: Tensor, device: torch.device) -> Tensor:
    """`x` on another device.

    From pageable memory a copy to a GPU would wait for all that the GPU has to do.
    """
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def numbers_on(device: torch.device, numbers: Sequence[int]) -> Tensor:
    """`(numbers,)` int64.

    >>> numbers_on(torch.device("cpu"), [3, 1])
    tensor([3, 1])
    """
    if len(set(numbers)) == 1:  # no copy
        return torch.full((len(numbers),), numbers[0], dtype=torch.int64, device=device)
    return sent(torch.tensor(numbers, dtype=torch.int64, device="cpu"), device)
