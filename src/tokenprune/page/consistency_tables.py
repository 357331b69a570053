"""Tables of how far scores agree with what the LLM attends to."""

from __future__ import annotations

from ..analysis.curves import Consistency, Curve
from ..bench.scoring import Mean
from .blocks import Section, row, table
from .markup import Html, join
from .numbers import NONE, with_error

_ASKING = {
    "output": "what the output tokens attend to (VTC-CLS, equation 4)",
    "last": "what the prompt's last token attends to",
}


def consistency_section(result: Consistency, figures: Html) -> Section:
    """Overlap and rank correlation of each scorer, mean over layers and by layer."""
    parts: list[str] = [figures]
    for queries, asking in _ASKING.items():
        curves = [one for one in result.curves if one.queries == queries and one.scorer]
        if curves:
            parts.append(_means(result, curves, asking))
            parts.append(_layers(result, curves, asking))
    return Section("consistency", "Agreement with the LLM's attention", join(parts))


def _means(result: Consistency, curves: list[Curve], asking: str) -> Html:
    lines = []
    for scorer in result.scorers:
        cells = [
            _shown(_found(curves, scorer, "overlap", keep), "overlap") for keep in result.keeps
        ]
        cells.append(_shown(_found(curves, scorer, "correlation", None), "correlation"))
        lines.append(row(scorer, *cells, kind="floor" if scorer == "random" else ""))
    keeps = [f"overlap at {keep}, %" for keep in result.keeps]
    return table(
        f"Scores against {asking}: mean over layers ± standard error",
        ["scores", *keeps, "rank correlation"],
        lines,
    )


def _layers(result: Consistency, curves: list[Curve], asking: str) -> Html:
    known = [_found(curves, scorer, "correlation", None) for scorer in result.scorers]
    layers = max((len(one.layers) for one in known if one), default=0)
    lines = [
        row(one.scorer, *(_plain(layer) for layer in one.layers), kind=_kind(one))
        for one in known
        if one
    ]
    return table(
        f"Rank correlation with {asking}, by layer of the LLM",
        ["scores", *(str(number) for number in range(1, layers + 1))],
        lines,
    )


def _kind(one: Curve) -> str:
    return "floor" if one.scorer == "random" else ""


def _found(curves: list[Curve], scorer: str, measure: str, keep: float | None) -> Curve | None:
    for one in curves:
        if one.scorer == scorer and one.measure == measure and one.keep == keep:
            return one
    return None


def _shown(curve: Curve | None, measure: str) -> str:
    if curve is None or not curve.mean.questions:
        return NONE
    mean = curve.mean
    if measure == "overlap":
        return with_error(mean.value, mean.error)
    return f"{mean.value:+.3f} ± {mean.error:.3f}"


def _plain(mean: Mean) -> str:
    return f"{mean.value:+.2f}" if mean.questions else NONE
