"""Grammar of specs: text cut into stages, steps and calls. It knows no plugin.

schedule := stage (";" stage)*
stage    := step ("|" step)* ["@" placement]   |   recipe ["@" placement]
step     := name ["(" arguments ")"]           arguments are Python literals
"""

from __future__ import annotations

import ast
import re
from typing import NamedTuple

from .brackets import cut
from .errors import SpecError

_CALL = re.compile(r"([A-Za-z][A-Za-z0-9_-]*)\s*(\(.*\))?", re.DOTALL)


class Call(NamedTuple):
    """Call in a spec: a name and its arguments."""

    name: str
    positional: tuple[object, ...]
    named: dict[str, object]


class StageText(NamedTuple):
    """Stage of a spec as it is written: its steps, and its placement if one is given."""

    steps: tuple[Call, ...]
    placement: Call | None


def stage_texts(spec: str) -> tuple[StageText, ...]:
    """The stages of `spec`, read but not looked up.

    Raises:
        SpecError: not of the form above.

    >>> stage_texts("random | evict(3) @ after-layer(2)")[0].placement
    Call(name='after-layer', positional=(2,), named={})
    """
    found = []
    for part in split(spec, ";", spec):
        before, *after = split(part, "@", spec)
        if len(after) > 1:
            raise SpecError(f"{spec!r} has more than one placement ('@') in a stage")
        steps = tuple(call_of(step, spec) for step in split(before, "|", spec))
        found.append(StageText(steps, call_of(after[0], spec) if after else None))
    return tuple(found)


def call_of(text: str, spec: str) -> Call:
    """The call that `text`, a part of `spec`, describes."""
    match = _CALL.fullmatch(text.strip())
    if match is None:
        raise SpecError(f"cannot read {text.strip()!r} in {spec!r}; a step looks like evict(128)")
    name, arguments = match.group(1), match.group(2) or "()"
    try:
        call = ast.parse(f"_{arguments}", mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            raise ValueError("more than one pair of parentheses")
        positional = tuple(ast.literal_eval(value) for value in call.args)
        named = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords if k.arg}
        if len(named) < len(call.keywords):
            raise ValueError("a name stands twice, or '**' is used")
    except (SyntaxError, TypeError, ValueError) as error:  # TypeError: {[1]} is unhashable
        raise SpecError(
            f"cannot read the arguments {arguments} of {name!r} in {spec!r}: {error}; they must "
            "be Python literals, e.g. (128), (layers=3) or (ensemble='max')"
        ) from None
    return Call(name, positional, named)


def split(text: str, separator: str, spec: str) -> list[str]:
    """`text` cut at separators that stand outside of brackets and quotes."""
    parts, _ = cut(text, separator)
    if not text.strip():
        raise SpecError(
            f"a stage or step is missing in {spec!r}; a spec looks like "
            "'cls-attention | evict(128) @ before-llm'"
        )
    if not all(part.strip() for part in parts):
        raise SpecError(f"nothing stands on one side of {separator!r} in {spec!r}")
    return parts
