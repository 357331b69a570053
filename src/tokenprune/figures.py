"""Figures of all plots: an empty one, and colours and marks that everybody can tell apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's palette, which colour-blind people can tell apart."""
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")


def figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that needs no display.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            f"plots need matplotlib: pip install 'tokenprune-vlm[plot]' ({error})"
        ) from error
    return Figure(figsize=(width, height), dpi=130, layout="constrained")
