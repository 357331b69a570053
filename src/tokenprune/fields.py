"""Checks of the fields of steps: by `__post_init__`, and by specs for what it does not check."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union

from .errors import SpecError


def check_whole(name: str, value: object, least: int, or_none: bool = False) -> None:
    """Refuse a field that is not an int of at least `least`.

    Raises:
        SpecError: what it must be, and what it was. `True` is no number here.
    """
    if value is None and or_none:
        return
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return
    alternative = " or None" if or_none else ""
    raise SpecError(f"{name} must be an int >= {least}{alternative}, got {value!r}")


def check_read(name: str, value: object, default: object, why: str, instead: str) -> None:
    """Refuse a field that was given although another one overrules it.

    Args:
        name: name of the field.
        value: what it holds.
        default: what it holds where nobody gave it.
        why: clause that says what overrules it.
        instead: what would make it count.

    Raises:
        SpecError: what has no effect, why, and what would work.
    """
    if value != default:
        raise SpecError(f"{name}={value!r} has no effect: {why}; leave it out, or say {instead}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse a field that is none of `choices`.

    Raises:
        SpecError: what it must be, and what it was.
    """
    if value not in choices:
        *first, last = map(repr, choices)
        raise SpecError(f"{name} must be {', '.join(first)} or {last}, got {value!r}")


def check_types(name: str, step: object) -> None:
    """Refuse fields whose values are not of the types that they are annotated with.

    Looks at what can stand in a spec: numbers, texts, None, literals, and tuples, lists and
    mappings of these. An int may stand for a float, a bool for no number. Anything else passes,
    and so does what a field has by default (`strength: float = None`).

    Args:
        name: what the step is called.
        step: an instance of a dataclass.

    Raises:
        SpecError: the field, its type and its value.
    """
    try:
        hints = typing.get_type_hints(type(step))
    except Exception:  # names that are imported for type checkers alone: nothing can be said
        return
    for field in dataclasses.fields(step):  # type: ignore[arg-type]
        value, hint = getattr(step, field.name), hints.get(field.name, Any)
        if value is not field.default and not _fits(value, hint):
            raise SpecError(
                f"{name} takes {field.name} as {_written(hint)}, got {value!r} "
                f"({type(value).__name__})"
            )


def _fits(value: object, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if hint is None or hint is type(None):
        return value is None
    if hint in (int, float):
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole or (hint is float and isinstance(value, float))
    if hint in (str, bool, bytes, complex):
        return isinstance(value, hint)
    if hint is tuple or origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(parts) == 2 and parts[1] is Ellipsis:
            return all(_fits(each, parts[0]) for each in value)
        return not parts or (len(parts) == len(value) and all(map(_fits, value, parts)))
    if origin in (list, Sequence):
        if not isinstance(value, list if origin is list else (list, tuple)):
            return False
        return all(_fits(each, parts[0]) for each in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(
            _fits(key, parts[0]) and _fits(each, parts[1]) for key, each in value.items()
        )
    return True


def _written(hint: Any) -> str:
    if typing.get_origin(hint) is None and isinstance(hint, type):
        return hint.__name__
    return str(hint).replace("typing.", "").replace("collections.abc.", "")
