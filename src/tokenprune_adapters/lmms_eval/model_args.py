"""`--model_args` with a spec in them: commas inside of brackets and quotes do not separate."""

from __future__ import annotations

from tokenprune.errors import SpecError

_CLOSING = {"(": ")", "[": "]", "{": "}"}


def read_arguments(text: str) -> dict[str, str]:
    """The pairs of ``name=value,name=value``; lmms-eval's own reader cuts specs at their commas.

    >>> read_arguments("pretrained=p,prune=important-diverse(64, important=0.5)")
    {'pretrained': 'p', 'prune': 'important-diverse(64, important=0.5)'}

    Raises:
        SpecError: a bracket or quote that is not closed, a part without "=", a name given twice.
    """
    arguments: dict[str, str] = {}
    for part in _parts(text):
        name, equals, value = (side.strip() for side in part.partition("="))
        if not (name and equals):
            raise SpecError(
                f"cannot read {part.strip()!r} in model_args {text!r}; write name=value pairs with "
                "commas between them, e.g. pretrained=llava-hf/llava-1.5-7b-hf,"
                "prune=vtc-cls(keep=128)"
            )
        if name in arguments:
            raise SpecError(f"{name!r} stands twice in model_args {text!r}")
        arguments[name] = value
    return arguments


def unquoted(value: str) -> str:
    """Without the quotes around the whole of `value`, which are left where no shell took them."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    return value


def _parts(text: str) -> list[str]:
    """`text` cut at commas that stand outside of brackets and quotes; empty parts are left out."""
    parts, start, quote = [], 0, ""
    open_brackets: list[str] = []
    escaped = False
    for index, char in enumerate(text):
        if escaped:
            escaped = False
        elif quote:
            escaped = char == "\\"
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in _CLOSING:
            open_brackets.append(_CLOSING[char])
        elif open_brackets and char == open_brackets[-1]:
            open_brackets.pop()
        elif char == "," and not open_brackets:
            parts.append(text[start:index])
            start = index + 1
    if quote or open_brackets:
        missing = quote or open_brackets[-1]
        raise SpecError(f"{missing} is missing in model_args {text!r}; quote them for the shell")
    parts.append(text[start:])
    return [part for part in parts if part.strip()]
