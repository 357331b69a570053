"""Where commands write."""

from __future__ import annotations

from rich.console import Console


def console() -> Console:
    """A console on what is standard output now; tests and pipes may have replaced it."""
    return Console(highlight=False)


def milliseconds(seconds: float) -> str:
    """A time for people, with three digits that count."""
    value = 1000 * seconds
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def size(count: int) -> str:
    """Bytes for people."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
