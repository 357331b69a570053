"""Scanner of brackets and quotes: text is cut at separators that stand outside of them."""

from __future__ import annotations

_CLOSING = {"(": ")", "[": "]", "{": "}"}


def cut(text: str, separator: str) -> tuple[list[str], str]:
    """Parts of `text` between separators, and the bracket or quote that is missing at its end.

    >>> cut("uniform | evict(4, per='a|b')", "|")
    (['uniform ', " evict(4, per='a|b')"], '')
    >>> cut("evict(4", "|")
    (['evict(4'], ')')
    """
    parts, start, quote, escaped = [], 0, "", False
    closing: list[str] = []
    for index, char in enumerate(text):
        if escaped:
            escaped = False
        elif quote:
            escaped = char == "\\"
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in _CLOSING:
            closing.append(_CLOSING[char])
        elif closing and char == closing[-1]:
            closing.pop()
        elif char == separator and not closing:
            parts.append(text[start:index])
            start = index + 1
    return [*parts, text[start:]], quote or (closing[-1] if closing else "")
