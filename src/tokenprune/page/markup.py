"""HTML from Python: what is not markup already is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_VOID = frozenset({"img", "meta", "br", "hr", "link"})


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, *content: str, **attributes: str | int | None) -> Html:
    """An element. Strings are escaped, `Html` is taken as it is.

    Args:
        name: name of the element.
        content: what is in it.
        attributes: underscores stand for hyphens, one at the end is dropped (`class_`); None leaves
            an attribute out.

    >>> tag("p", "1 < 2, ", tag("b", "yes"), class_="it's")
    '<p class="it&#x27;s">1 &lt; 2, <b>yes</b></p>'
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{join(content)}</{name}>")


def join(parts: Sequence[str], between: str = "") -> Html:
    """Parts in a row, those that are not markup escaped.

    >>> join(["a & b", Html("<hr>")])
    'a &amp; b<hr>'
    """
    return Html(between.join(p if isinstance(p, Html) else escape(p) for p in parts))
