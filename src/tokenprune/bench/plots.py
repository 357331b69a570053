"""Plots of a bench: accuracy against kept tokens, and against time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..figures import COLOURS, MARKS, figure
from .result import Bench, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GRAYS = {"random": "#444444", "uniform": "#777777", "pool": "#aaaaaa"}
_LINES = {"random": "--", "uniform": "-.", "pool": ":", "oracle": "-", "inverted": "--"}


def plot(bench: Bench, folder: Path) -> list[Path]:
    """Write `accuracy.png` and `pareto.png` into `folder`, and say so.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in (("accuracy", _accuracy), ("pareto", _pareto)):
        empty = figure(7.2, 4.6)
        draw(bench, empty)
        written.append(folder / f"{name}.png")
        empty.savefig(written[-1])
    return written


def _accuracy(bench: Bench, canvas: Figure) -> None:
    axes = canvas.subplots()
    vanilla = bench.rows[0]
    whole = vanilla.tokens[-1][1]
    for label, rows in _curves(bench.rows).items():
        rows = sorted(rows, key=lambda row: row.tokens[-1][1])
        style = _style(label, rows[0].kind, bench.rows)
        axes.errorbar(
            [row.tokens[-1][1] for row in rows],
            [100 * row.accuracy for row in rows],
            yerr=[100 * row.error for row in rows],
            label=label,
            capsize=2,
            **style,
        )
    axes.axhline(100 * vanilla.accuracy, color="black", linewidth=1, label="vanilla")
    blind = next((row for row in bench.rows if row.label == "blind"), None)
    if blind is not None:
        axes.axhline(100 * blind.accuracy, color="black", linewidth=1, linestyle=":", label="blind")
    ticks = sorted({row.tokens[-1][1] for row in bench.rows} | {whole})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(f"visual tokens kept of {whole:.0f} (last LLM layer)")
    _finish(axes, bench)


def _pareto(bench: Bench, canvas: Figure) -> None:
    axes = canvas.subplots()
    vanilla = bench.rows[0]
    for label, rows in _curves(bench.rows).items():
        if rows[0].kind == "control":
            continue
        rows = sorted(rows, key=lambda row: row.total_ms)
        style = _style(label, rows[0].kind, bench.rows)
        style["linestyle"] = "none"
        axes.errorbar(
            [row.total_ms for row in rows],
            [100 * row.accuracy for row in rows],
            yerr=[100 * row.error for row in rows],
            label=label,
            capsize=2,
            **style,
        )
        for row in rows if rows[0].kind == "method" else ():
            kept, point = f"{row.tokens[-1][1]:.0f}", (row.total_ms, 100 * row.accuracy)
            axes.annotate(kept, point, (5, 4), textcoords="offset points", fontsize=7)
    axes.plot(
        [vanilla.total_ms],
        [100 * vanilla.accuracy],
        "*",
        color="black",
        markersize=11,
        label="vanilla",
    )
    front = _front([row for row in bench.rows if row.kind != "control"])
    axes.step(
        [row.total_ms for row in front],
        [100 * row.accuracy for row in front],
        where="post",
        color="black",
        linewidth=1,
        alpha=0.5,
        label="best so far",
    )
    axes.set_xlabel(
        f"milliseconds a question ({bench.device}, batch {bench.batch}); numbers: tokens kept"
    )
    _finish(axes, bench)


def _finish(axes: Axes, bench: Bench) -> None:
    axes.set_ylabel("accuracy in %, mean over question types")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"{bench.model}: {bench.data['questions']} questions, {bench.data['pictures']} pictures; "
        "bars: ± 1 standard error",
        fontsize=9,
        loc="left",
    )
    axes.legend(fontsize=8, frameon=False, bbox_to_anchor=(1, 1), loc="upper left")


def _curves(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by label, without those that are lines of their own."""
    curves: dict[str, list[Row]] = {}
    for row in rows[1:]:
        if row.label != "blind":
            curves.setdefault(row.label, []).append(row)
    return curves


def _style(label: str, kind: str, rows: Sequence[Row]) -> dict[str, Any]:
    inside = " @ " in label
    if kind == "method":
        place = list(dict.fromkeys(row.label for row in rows if row.kind == "method")).index(label)
        colour, mark = COLOURS[place % len(COLOURS)], MARKS[place % len(MARKS)]
        return {"color": colour, "marker": mark, "linewidth": 2, "markersize": 6}
    name = label.partition(" ")[0]
    line, colour = _LINES.get(name, "-"), _GRAYS.get(name, "#b8a04a")
    return {
        "color": colour,
        "marker": "x" if inside else ".",
        "linewidth": 1,
        "linestyle": line,
        "markersize": 5,
    }


def _front(rows: Sequence[Row]) -> list[Row]:
    """Rows that no faster row reaches in accuracy, from the fastest on."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.total_ms, -row.accuracy)):
        if not front or row.accuracy > front[-1].accuracy:
            front.append(row)
    return front
