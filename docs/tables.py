"""Write the tables of strategies in the documentation, from the records of our own plugins.

Run it with `make tables`; a test says when that was forgotten.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tokenprune.cli.catalogue import differences, markdown
from tokenprune.plugins import Registry, registry

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "reference" / "strategies.md")
STRATEGIES = "<!-- strategies: written by `make tables` -->", "<!-- end of strategies -->"
DIFFERENCES = "<!-- differences: written by `make tables` -->", "<!-- end of differences -->"
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
    text = _filled(text, *STRATEGIES, markdown(own(registry())))
    if DIFFERENCES[0] in text:
        text = _filled(text, *DIFFERENCES, differences(own(registry())))
    return text


def _filled(text: str, begin: str, end: str, table: str) -> str:
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"no place for the tables: {begin} ... {end}")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))
