"""Write the tables of strategies in the documentation, from the records of our own plugins.

Run it with `make tables`; a test says when that was forgotten.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tokenprune.cli.catalogue import markdown
from tokenprune.plugins import Registry, registry

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "reference" / "strategies.md")
BEGIN, END = "<!-- strategies: written by `make tables` -->", "<!-- end of strategies -->"
OURS = ("tokenprune", "tokenprune-vlm")


def own(known: Registry) -> Registry:
    """`known` without what other installed packages offer."""
    offers = {
        field.name: [o for o in getattr(known, field.name) if o.origin in OURS]
        for field in dataclasses.fields(known)
        if field.name != "broken"
    }
    return Registry(**offers)


def with_tables(text: str) -> str:
    """`text` with the tables of today between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no place for the tables: {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{markdown(own(registry()))}\n\n{END}{after}"


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))
