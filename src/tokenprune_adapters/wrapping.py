"""Wrap one method of one model, where hooks do not reach: `generate` calls it outside of `forward`.

What is set is an attribute of the instance, so that removing it shows the class's method again.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokenprune.adapter import Removable
from tokenprune.errors import AttachError

Around = Callable[[Callable[[], Any], Mapping[str, Any]], Any]
"""Takes the call as it was made, to be made inside, and its arguments by name; gives the output."""


def wrap_method(owner: nn.Module, name: str, around: Around) -> Iterator[Removable]:
    """Put `around` around a method of `owner`, and yield the handle.

    Raises:
        AttachError: somebody else has done so.
    """
    if name in vars(owner):
        raise AttachError(f"somebody else has replaced {type(owner).__name__}.{name}")
    original = getattr(owner, name)
    signature = inspect.signature(original)

    # `generate` chooses arguments by the signature, which `wraps` hands on.
    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        return around(lambda: original(*args, **kwargs), arguments)

    setattr(owner, name, wrapped)
    yield _Attribute(owner, name)


@dataclass(frozen=True)
class _Attribute:
    """An instance attribute that was set."""

    owner: nn.Module
    name: str

    def remove(self) -> None:
        """Show what the class says again."""
        vars(self.owner).pop(self.name, None)
