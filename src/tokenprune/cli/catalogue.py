"""Catalogue of what is installed, as lines. Pure data, so that documentation can use it too."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

from ..budget import Budgeted
from ..plugins import CORE, ReducerPlugin, Registry, ScorerPlugin
from ..spec import PLACEMENTS


@dataclass(frozen=True)
class Line:
    """Line of the catalogue: one thing that is offered.

    Attributes:
        kind: "scorer", "reducer", "placement", "recipe", "tower" or "model".
        name: what users write.
        summary: one line.
        needs: signals that a strategy reads, or classes that an adapter serves.
        paper: where the idea comes from.
        origin: the distribution that offers it.
    """

    kind: str
    name: str
    summary: str
    needs: str
    paper: str
    origin: str


def catalogue(known: Registry) -> Iterator[Line]:
    """Everything in `known`, kind by kind, each in the order of registration."""
    for scorer in known.scorers:
        yield _strategy("scorer", scorer.plugin, scorer.origin)
    for reducer in known.reducers:
        yield _strategy("reducer", reducer.plugin, reducer.origin)
    for name, placement in PLACEMENTS.items():
        summary = (inspect.getdoc(placement) or "").partition("\n")[0].rstrip(".")
        yield Line("placement", name, summary, "", "", CORE)
    for recipe in known.recipes:
        plugin = recipe.plugin
        yield Line(
            "recipe", plugin.name, plugin.summary, plugin.expand(), plugin.paper, recipe.origin
        )
    for kind, offers in (("tower", known.towers), ("model", known.models)):
        for offer in offers:
            classes = ", ".join(claim.rpartition(".")[2] for claim in offer.plugin.claims)
            yield Line(kind, offer.plugin.name, offer.plugin.summary, classes, "", offer.origin)


def _strategy(kind: str, plugin: ScorerPlugin | ReducerPlugin, origin: str) -> Line:
    return Line(kind, plugin.name, plugin.summary, _needs(plugin), plugin.paper, origin)


def _needs(plugin: ScorerPlugin | ReducerPlugin) -> str:
    """Names of the signals that a strategy reads in its default configuration."""
    try:
        step = plugin.factory(keep=1) if issubclass(plugin.factory, Budgeted) else plugin.factory()
    except TypeError:
        return "depends on its arguments"
    scores = ["scores"] if getattr(step, "needs_scores", False) else []
    return ", ".join([*scores, *sorted(type(signal).__name__ for signal in step.signals)])


def markdown(known: Registry) -> str:
    """The strategies of `known` as a Markdown table, in front of one of the recipes."""
    lines = [line for line in catalogue(known) if line.kind in ("scorer", "reducer", "recipe")]
    steps = ["| | name | what it does | reads | from |", "|---|---|---|---|---|"]
    recipes = ["| recipe | is short for | from |", "|---|---|---|"]
    for line in lines:
        if line.kind == "recipe":
            recipes.append(f"| `{line.name}` | `{_cell(line.needs)}` | {_cell(line.paper)} |")
        else:
            cells = (line.summary, line.needs, line.paper)
            rest = " | ".join(_cell(cell) for cell in cells)
            steps.append(f"| {line.kind} | `{line.name}` | {rest} |")
    return "\n".join([*steps, "", *recipes])


def differences(known: Registry) -> str:
    """Where recipes knowingly differ from released code, as a Markdown table."""
    rows = ["| recipe | differs from the released code |", "|---|---|"]
    plugins = [offer.plugin for offer in known.recipes if offer.plugin.differs]
    return "\n".join([*rows, *(f"| `{p.name}` | {_cell(p.differs)} |" for p in plugins)])


def _cell(text: str) -> str:
    """Bars would end the cell."""
    return text.replace("|", "\\|")
