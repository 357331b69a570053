"""`tokenprune list`: one line for each thing that is installed."""

from __future__ import annotations

from itertools import groupby
from textwrap import fill

from ..plugins import Registry, registry
from .catalogue import Line, catalogue, markdown
from .console import console

_HEADINGS = {
    "scorer": "Scorers (say how important each visual token is)",
    "reducer": "Reducers (decide which stay or merge)",
    "placement": "Placements (where in the model)",
    "recipe": "Recipes (the papers' methods; more with --recipes)",
    "tower": "Adapters for vision towers",
    "model": "Adapters for models",
}
_NEEDS = {"recipe": "=", "tower": "for", "model": "for"}


def show_offers() -> None:
    """Print everything, kind by kind."""
    out = console()
    lines = list(catalogue(registry()))
    width = max(len(line.name) for line in lines)
    known = registry()
    for kind, group in groupby(lines, key=lambda line: line.kind):
        out.print(_HEADINGS[kind], style="bold")
        for line in group:
            text = f"  {line.name:<{width}}  {_about(line, known)}"
            if out.is_terminal:
                text = fill(text, out.width, subsequent_indent=" " * (width + 4))
            # In a pipe one line each: people grep it.
            out.print(text, markup=False, soft_wrap=True)
        out.print()
    for name, error in registry().broken.items():
        out.print(f"broken: {name}: {error}", style="red", markup=False, soft_wrap=True)


def _about(line: Line, known: Registry) -> str:
    needs = f"; {_NEEDS.get(line.kind, 'reads')} {line.needs}" if line.needs else ""
    others = known.holders(line.name)
    others.pop(line.origin, None)
    clash = " and ".join(f"a {kinds} of {origin}" for origin, kinds in others.items())
    marked = f"; NAME CLASH with {clash}: neither works by name" if clash else ""
    return f"{line.summary}{needs}{marked}  [{line.origin}]"


def show_recipes() -> None:
    """Print each recipe with its paper, its spec and where we knowingly differ."""
    out = console()
    for offer in registry().recipes:
        plugin = offer.plugin
        facts = {
            "is": plugin.summary,
            "paper": plugin.paper,
            "spec": plugin.expand(),
            "differs": plugin.differs,
        }
        out.print(plugin.name, style="bold", markup=False)
        for name, fact in facts.items():
            if fact:
                out.print(f"  {name:<8}{fact}", markup=False, soft_wrap=True)
        out.print()


def show_models() -> None:
    """Print each class that has an adapter, with what can be done to models of it."""
    out = console()
    for offer in registry().models:
        plugin = offer.plugin
        names = ", ".join(claim.rpartition(".")[2] for claim in plugin.claims)
        out.print(names, style="bold", markup=False, soft_wrap=True)
        facts = {"adapter": f"{plugin.name}: {plugin.summary}  [{offer.origin}]"}
        facts |= {} if plugin.facts is None else plugin.facts()
        width = max(map(len, facts))
        for heading, fact in facts.items():
            out.print(f"  {heading:<{width}}  {fact}", markup=False, soft_wrap=True)
        out.print()


def show_markdown() -> None:
    """Print the table that the documentation shows."""
    console().print(markdown(registry()), markup=False, soft_wrap=True)
