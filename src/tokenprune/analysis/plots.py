"""Plots of how far scores agree with what the LLM attends to: by layer, and over K."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import TokenpruneError
from ..figures import COLOURS, MARKS, figure
from ..scorers import ClsAttentionScorer
from .curves import RANDOM, Consistency, Curve, Measure, Queries
from .noted_scores import scorer_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# K is an order, so its lines are shades of one scale (viridis, which colour-blind people read as
# dark to light).
_SCALE = "viridis"
_GRAY = "#777777"
_MANY = 16  # layers, from which on error bars would hide the lines
_ASKING: dict[Queries, str] = {
    "output": "output tokens ask",
    "last": "last token of the prompt asks",
}


class _Panel(NamedTuple):
    """Column of plots."""

    measure: Measure
    keep: int | float | None
    title: str
    label: str
    times: float


def plot(result: Consistency, folder: Path) -> list[Path]:
    """Write `consistency.png`, and `over_k.png` where several K were measured, into `folder`.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    panels = _panels(result)
    asked = [each for each in _ASKING if result.curve("", "share", each).mean.questions]
    wide = 3.3 if _depth(result) <= _MANY else 4
    size = wide * len(panels) + 0.4, 2.8 * len(asked) + 1
    canvas = figure(*size)
    _by_layer(result, panels, asked, canvas)
    written = [folder / "consistency.png"]
    canvas.savefig(written[0])
    ensembles = _ensembles(result)
    if len(ensembles) > 1:
        canvas = figure(3.6 * (len(panels) - 1), 3.7)
        _over_k(result, panels[:-1], asked, ensembles, canvas)
        written.append(folder / "over_k.png")
        canvas.savefig(written[1])
    return written


def _panels(result: Consistency) -> list[_Panel]:
    overlaps = [
        _Panel(
            "overlap",
            keep,
            f"overlap at {_budget(keep, result)}",
            "shared by both kept sets, %",
            100,
        )
        for keep in result.keeps
    ]
    related = _Panel("correlation", None, "rank correlation", "Spearman's coefficient", 1)
    share = _Panel("share", None, "attention to the picture", "share of all attention, %", 100)
    return [*overlaps, related, share]


def _by_layer(
    result: Consistency, panels: Sequence[_Panel], asked: Sequence[Queries], figure: Figure
) -> None:
    grid = figure.subplots(len(asked), len(panels), sharex=True, squeeze=False)
    for row, queries in enumerate(asked):
        for axes, panel in zip(grid[row], panels, strict=True):
            scorers = [""] if panel.measure == "share" else result.scorers
            for place, scorer in enumerate(scorers):
                curve = result.curve(scorer, panel.measure, queries, panel.keep)
                _line(axes, curve, panel.times, place, _style(scorer, result))
            _finish(axes, panel)
            axes.xaxis.get_major_locator().set_params(integer=True)
            if row == 0:
                axes.set_title(panel.title, fontsize=10)
            if row == len(asked) - 1:
                axes.set_xlabel("layer of the LLM (1 runs first)", fontsize=9)
        grid[row][0].annotate(
            _ASKING[queries],
            (-0.3, 0.5),
            xycoords="axes fraction",
            rotation=90,
            ha="center",
            va="center",
            fontsize=10,
            fontweight="bold",
        )
    for column, panel in enumerate(panels):
        _same_scale([axes[column] for axes in grid], panel)
    lines, labels = grid[0][0].get_legend_handles_labels()
    columns = min(len(labels), 6)
    figure.legend(
        lines, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    deep = _depth(result) > _MANY
    heading = _heading(result, "bands" if deep else "bars")
    figure.suptitle(heading, fontsize=9, x=0.01, ha="left")


def _over_k(
    result: Consistency,
    panels: Sequence[_Panel],
    asked: Sequence[Queries],
    ensembles: dict[int, str],
    figure: Figure,
) -> None:
    styles: dict[Queries, Any] = {
        "output": {"color": COLOURS[0], "marker": "o"},
        "last": {"color": COLOURS[1], "marker": "s"},
    }
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(row, panels, strict=True):
        for queries in asked:
            means = [
                result.curve(scorer, panel.measure, queries, panel.keep).mean
                for scorer in ensembles.values()
            ]
            axes.errorbar(
                list(ensembles),
                [panel.times * each.value for each in means],
                yerr=[panel.times * each.error for each in means],
                capsize=4,
                linewidth=1.4,
                markersize=4,
                label=_ASKING[queries],
                **styles[queries],
            )
            chance = result.curve(RANDOM, panel.measure, queries, panel.keep).mean
            axes.axhline(
                panel.times * chance.value,
                color=styles[queries]["color"],
                linewidth=1,
                linestyle=(0, (4, 3)),
                label=f"random scores, {_ASKING[queries]}",
            )
        _finish(axes, panel)
        _same_scale([axes], panel)
        axes.set_xticks(list(ensembles))
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel("K, layers of the tower in the ensemble", fontsize=9)
    lines, labels = row[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    heading = _heading(result, "mean over layers; bars")
    figure.suptitle(heading, fontsize=9, x=0.01, ha="left")


def _line(axes: Axes, curve: Curve, times: float, place: int, style: dict[str, Any]) -> None:
    """A line with an error at each layer; of deep models with a band, and marks that take turns."""
    layers = range(1, len(curve.layers) + 1)
    values = [times * each.value for each in curve.layers]
    errors = [times * each.error for each in curve.layers]
    if len(layers) <= _MANY:
        axes.errorbar(layers, values, yerr=errors, capsize=2, elinewidth=1, **style)
        return
    pairs = list(zip(values, errors, strict=True))
    low, high = [v - e for v, e in pairs], [v + e for v, e in pairs]
    axes.fill_between(layers, low, high, color=style["color"], alpha=0.2, linewidth=0)
    axes.plot(layers, values, markevery=(place % 6, 6), **style)


def _style(scorer: str, result: Consistency) -> dict[str, Any]:
    if scorer in ("", RANDOM):
        line = "-" if scorer == "" else (0, (4, 3))
        colour = "black" if scorer == "" else _GRAY
        return {"color": colour, "linestyle": line, "label": "random scores", "linewidth": 1.4}
    ensembles = _ensembles(result)
    for place, (layers, name) in enumerate(ensembles.items()):
        if name == scorer:
            from matplotlib import colormaps

            shade = colormaps[_SCALE](0.9 * place / max(len(ensembles) - 1, 1))
            label = f"[CLS], K = {layers}"
            return {**_marked(place), "color": shade, "label": label}
    others = [each for each in result.scorers if each not in ensembles.values()]
    place = others.index(scorer)
    colour = COLOURS[place % len(COLOURS)]
    return {**_marked(place + len(ensembles)), "color": colour, "label": scorer}


def _marked(place: int) -> dict[str, Any]:
    return {"marker": MARKS[place % len(MARKS)], "markersize": 5, "linewidth": 1.4}


def _ensembles(result: Consistency) -> dict[int, str]:
    """The scorers that are VTC-CLS's, by their K."""
    found = {}
    for spec in result.scorers:
        try:
            scorer, _ = scorer_of(spec)
        except TokenpruneError:  # an object that has no spec
            continue
        if not isinstance(scorer, ClsAttentionScorer) or not isinstance(scorer.layers, int):
            continue
        if scorer == ClsAttentionScorer(scorer.layers):
            found[scorer.layers] = spec
    return dict(sorted(found.items()))


def _finish(axes: Axes, panel: _Panel) -> None:
    axes.set_ylabel(panel.label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.measure == "correlation":
        axes.axhline(0, color="black", linewidth=0.6)


def _same_scale(column: Sequence[Axes], panel: _Panel) -> None:
    """Plots below each other can be compared; percentages start at zero."""
    low = min(axes.get_ylim()[0] for axes in column)
    high = max(axes.get_ylim()[1] for axes in column)
    for axes in column:
        axes.set_ylim(low if panel.measure == "correlation" else 0, min(high, 1.02 * panel.times))


def _depth(result: Consistency) -> int:
    return len(result.curves[0].layers)


def _budget(keep: int | float, result: Consistency) -> str:
    if isinstance(keep, int):
        return f"{keep} tokens"
    return f"{100 * keep:.3g} % of {result.tokens:.0f} tokens"


def _heading(result: Consistency, error: str = "bars") -> str:
    return (
        f"{result.model}: {result.data['questions']} questions about {result.data['pictures']} "
        f"pictures; {error}: ± 1 standard error, clustered by picture"
    )
