"""Checks of the fields of steps, which `__post_init__` calls."""

from __future__ import annotations

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
