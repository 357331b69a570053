"""`tokenprune report`: one HTML page of what other commands wrote into a folder."""

from __future__ import annotations

from pathlib import Path

from ..page import write_page
from .console import console


def run_report(folder: Path) -> Path:
    """Write `report.html` into `folder`."""
    path = write_page(folder)
    kilobytes = path.stat().st_size / 1000
    text = f"wrote {path} ({kilobytes:.0f} kB), which opens in any browser without network"
    console().print(text, markup=False, soft_wrap=True)
    return path
