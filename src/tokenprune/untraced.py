"""Decorator for what `torch.compile` should not trace: decisions, records, what waits anyway."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable[..., object])


def untraced(function: F) -> F:
    """Let `function` run as it is inside of compiled code: one graph break instead of many."""
    disabled: F = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled
