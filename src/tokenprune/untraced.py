"""Decorator for what nobody should trace: decisions, records, what waits anyway."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.jit import is_tracing  # type: ignore[attr-defined]

from .errors import UnsupportedError

P = ParamSpec("P")
T = TypeVar("T")

_WORDS = (
    "tokenprune decides for each picture which tokens stay, which no trace can hold: "
    "torch.compile runs it as it is, but an attached model cannot be exported (torch.export, "
    "torch.jit.trace, ONNX); detach first"
)
_REASON = (
    {"reason": _WORDS} if "reason" in inspect.signature(torch.compiler.disable).parameters else {}
)

_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
"""Since torch 2.7; before, such a model fails with an error of torch's own."""


def refuse_traces() -> None:
    """Refuse to decide anything while a model is exported or traced for good.

    Raises:
        UnsupportedError: it is.
    """
    if _is_exporting() or is_tracing():  # type: ignore[no-untyped-call]
        raise UnsupportedError(_WORDS)


def untraced(function: Callable[P, T]) -> Callable[P, T]:
    """Let `function` run as it is inside of compiled code: one graph break instead of many.

    Where a model is exported or traced for good, it is refused in words: a trace would hold the
    decisions of one picture.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        refuse_traces()
        return function(*args, **kwargs)

    disabled: Callable[P, T] = torch.compiler.disable(run, **_REASON)  # type: ignore[no-untyped-call]
    return disabled
