"""Arguments of `--model_args` with a spec in them, whose commas do not separate."""

from __future__ import annotations

from tokenprune.brackets import cut
from tokenprune.errors import SpecError


def read_arguments(text: str) -> dict[str, str]:
    """Pairs of ``name=value,name=value``; lmms-eval's own reader cuts specs at their commas.

    >>> read_arguments("pretrained=p,prune=important-diverse(64, important=0.5)")
    {'pretrained': 'p', 'prune': 'important-diverse(64, important=0.5)'}

    Raises:
        SpecError: a bracket or quote that is not closed, a part without "=", a name given twice.
    """
    parts, missing = cut(text, ",")
    if missing:
        raise SpecError(f"{missing} is missing in model_args {text!r}; quote them for the shell")
    arguments: dict[str, str] = {}
    for part in filter(str.strip, parts):
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
