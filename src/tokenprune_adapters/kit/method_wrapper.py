"""Wrapper of one method of one model, where hooks do not reach: `generate` calls it by itself.

What is set is an attribute of the instance, so that removing it shows the class's method again.
`torch.compile` runs the method as it is, untraced.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokenprune.errors import AttachError
from tokenprune.hooks import Removable
from tokenprune.untraced import untraced

Around = Callable[[Callable[[], Any], Mapping[str, Any]], Any]
"""Takes the call as it was made, to be made inside, and its arguments by name; gives the output."""


_AROUNDS = "tokenprune_arounds"
"""Attribute of a method that was wrapped here: what is around it, from the inside out."""


def wrap_method(owner: nn.Module, name: str, around: Around) -> Iterator[Removable]:
    """Put `around` around a method of `owner`, and around what was put there before.

    >>> pool = nn.AvgPool1d(2)
    >>> (handle,) = wrap_method(pool, "extra_repr", lambda call, arguments: call() + ", wrapped")
    >>> pool
    AvgPool1d(kernel_size=(2,), stride=(2,), padding=(0,), wrapped)
    >>> handle.remove()
    >>> "extra_repr" in vars(pool)
    False

    Args:
        owner: model that holds the method.
        name: name of the method.
        around: what is put around it (see `Around`).

    Raises:
        AttachError: somebody else has replaced the method.
    """
    if is_replaced(owner, name):
        raise AttachError(f"somebody else has replaced {type(owner).__name__}.{name}")
    if name not in vars(owner):
        setattr(owner, name, _wrapped(getattr(owner, name)))
    arounds: list[Around] = getattr(vars(owner)[name], _AROUNDS)
    arounds.append(around)
    yield _Wrapper(owner, name, arounds, around)


def is_replaced(owner: nn.Module, name: str) -> bool:
    """Whether somebody else has replaced a method of `owner`, which cannot be wrapped then."""
    present = vars(owner).get(name)
    return present is not None and not hasattr(present, _AROUNDS)


def _wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    names = tuple(inspect.signature(original).parameters)
    arounds: list[Around] = []

    # `generate` chooses arguments by the signature, which `wraps` hands on.
    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        call = functools.partial(original, *args, **kwargs)
        for around in tuple(arounds):
            call = functools.partial(around, call, arguments)
        return call()

    # Hooks on some blocks of a tower are not seen where torch.compile runs the code of another one.
    plain = untraced(wrapped)
    setattr(plain, _AROUNDS, arounds)
    return plain


@dataclass(frozen=True)
class _Wrapper:
    """Handle of what was put around a method; the last removed shows the class's method again."""

    owner: nn.Module
    name: str
    arounds: list[Around]
    around: Around

    def remove(self) -> None:
        """Take it away again."""
        if self.around in self.arounds:
            self.arounds.remove(self.around)
        if not self.arounds:
            vars(self.owner).pop(self.name, None)
