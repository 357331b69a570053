"""Numbers as people read them."""

from __future__ import annotations

import math

NONE = "–"


def percent(value: float | None, digits: int = 1) -> str:
    """A share in percent, without its sign.

    >>> percent(0.125), percent(None)
    ('12.5', '–')
    """
    return NONE if _missing(value) else f"{100 * (value or 0):.{digits}f}"


def with_error(value: float | None, error: float | None) -> str:
    """A share in percent and its standard error.

    >>> with_error(0.5, 0.0123), with_error(0.5, None)
    ('50.0 ± 1.2', '50.0')
    """
    return percent(value) if _missing(error) else f"{percent(value)} ± {percent(error)}"


def milliseconds(value: float | None) -> str:
    """Three digits that count.

    >>> milliseconds(0.01234), milliseconds(1234.5), milliseconds(0)
    ('0.0123', '1234', '–')
    """
    if _missing(value) or not value:
        return NONE
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def size(count: float | None) -> str:
    """Bytes.

    >>> size(1536), size(None)
    ('1.5 KiB', '–')
    """
    if count is None or _missing(count):
        return NONE
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def count(value: float | None) -> str:
    """A mean number of things.

    >>> count(14.0), count(13.5)
    ('14', '13.5')
    """
    return NONE if value is None or _missing(value) else f"{value:.1f}".removesuffix(".0")


def _missing(value: float | None) -> bool:
    return value is None or math.isnan(value)
