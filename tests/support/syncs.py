"""Count of host syncs: what a GPU would have to wait for, counted on a CPU."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_WAITS = {
    Tensor.tolist,
    Tensor.item,
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__index__,
    Tensor.nonzero,
    torch.nonzero,
    torch.equal,
    Tensor.equal,
    torch.masked_select,
    Tensor.masked_select,
    torch.bincount,
    torch.unique,
}


class Syncs(TorchFunctionMode):
    """Calls that hand a value of a tensor to Python, or make a shape of one.

    Attributes:
        found: where each was made, the innermost frame last.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        mask = func is Tensor.__getitem__ and _has_mask(args[1])
        write = func is Tensor.__setitem__ and _waits(args[1], args[2])
        if func in _WAITS or mask or write:
            frame = traceback.extract_stack(limit=2)[0]
            self.found.append(f"{frame.filename}:{frame.lineno}: {func.__name__}")
        return func(*args, **(kwargs or {}))


def _waits(index: Any, value: Any) -> bool:
    """Whether a write makes a shape of a mask, or copies a number to where slots are named."""
    parts = index if isinstance(index, tuple) else (index,)
    named = any(isinstance(part, Tensor) and part.dtype != torch.bool for part in parts)
    return _has_mask(index) if isinstance(value, Tensor) else named


def _has_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)
