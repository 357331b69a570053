"""Console of the commands, and the tables that they print."""

from __future__ import annotations

import os

from rich.box import SIMPLE_HEAVY
from rich.console import Console
from rich.table import Table


def console() -> Console:
    """A console on what is standard output now; tests and pipes may have replaced it."""
    out = Console(highlight=False)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = 100  # nobody has to turn a file's lines
    return out


def table(*headings: str, footer: bool = False) -> Table:
    """An empty table without frame, columns close together."""
    return Table(
        *headings,
        box=SIMPLE_HEAVY,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        show_footer=footer,
    )


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
