"""Tables of the documentation and versions in pyproject.toml, written from what the package knows.

Strategies come from the records of our own plugins, versions from the table of tested ones. Run it
with `make tables`; a test says when that was forgotten.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from tokenprune.cli.catalogue import differences, markdown
from tokenprune.plugins import CORE, Registry, registry
from tokenprune.versions import LIBRARIES, Library, library
from tokenprune_adapters.hf.families import FAMILIES
from tokenprune_adapters.hf.family_plugin import facts_of

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
MODELS = ROOT / "docs" / "how-to" / "use-another-model.md"
PAGES = (ROOT / "README.md", REFERENCE / "strategies.md", REFERENCE / "compatibility.md", MODELS)
PROJECTS = (ROOT / "pyproject.toml", *sorted((ROOT / "docs" / "examples").glob("*/pyproject.toml")))
STRATEGIES = "<!-- strategies: written by `make tables` -->", "<!-- end of strategies -->"
SIX = "<!-- six recipes: written by `make tables` -->", "<!-- end of six recipes -->"
FIRST = ("vtc-cls", "fastv", "visionzip", "divprune", "prumerge", "tome")
FAMILY = "<!-- families: written by `make tables` -->", "<!-- end of families -->"
DIFFERENCES = "<!-- differences: written by `make tables` -->", "<!-- end of differences -->"
VERSIONS = "<!-- versions: written by `make tables` -->", "<!-- end of versions -->"


def own(known: Registry) -> Registry:
    """`known` without what other installed packages offer."""
    offers = {
        field.name: [o for o in getattr(known, field.name) if o.origin == CORE]
        for field in dataclasses.fields(known)
        if field.name != "broken"
    }
    return Registry(**offers)


def with_tables(text: str) -> str:
    """`text` with the tables of today between its markers."""
    tables = {STRATEGIES: markdown, SIX: first, DIFFERENCES: differences}
    made = {marks: write(own(registry())) for marks, write in tables.items() if marks[0] in text}
    if FAMILY[0] in text:
        made[FAMILY] = families()
    if VERSIONS[0] in text:
        made[VERSIONS] = versions()
    if not made:
        raise ValueError("no place for the tables: the page has none of their markers")
    for marks, table in made.items():
        text = _filled(text, *marks, table)
    return text


def first(known: Registry) -> str:
    """Six recipes to begin with, in Markdown: what they do, and whose they are."""
    recipes = {offer.plugin.name: offer.plugin for offer in known.recipes}
    rows = (f"| `{name}` | {recipes[name].summary} | {recipes[name].paper} |" for name in FIRST)
    return "\n".join(("| recipe | what it does | from |", "|---|---|---|", *rows))


def families() -> str:
    """The families that are described by data, in Markdown."""
    columns = [
        "takes",
        "positions before the LLM",
        "signals of the tower",
        "budgets are for a",
        "transformers",
    ]
    rows = [f"| class | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for family in FAMILIES:
        names = ", ".join(f"`{each.rpartition('.')[2]}`" for each in family.classes)
        facts = facts_of(family)
        rows.append(f"| {names} | {' | '.join(facts[each] for each in columns)} |")
    return "\n".join(rows)


def versions() -> str:
    """The table of tested versions, in Markdown."""
    rows = ("| library | versions | installed by | tested by |", "|---|---|---|---|")
    return "\n".join((*rows, *map(_row, LIBRARIES)))


def _row(each: Library) -> str:
    names = " or ".join(f"`{name}`" for name in (each.name, *each.others))
    if each.extra:
        origin = f"`tokenprune-vlm[{each.extra}]`"
    else:
        origin = "`tokenprune-vlm`" if each.name == "torch" else "you"
    targets = ", ".join(f"`make {target}`" for target in each.tested)
    return f"| {names} | {each.span} | {origin} | {targets} |"


def with_versions(project: str) -> str:
    """`project`, the text of a pyproject.toml, with the versions of the table.

    Requirements keep their extras; a library that the table does not know stays as it is.
    """
    python = library("python")
    project = re.sub(r'(?m)^(requires-python = ">=)[\d.]+"', rf'\g<1>{python.oldest}"', project)
    project = re.sub(r'(?m)^(target-version = "py)\d+"', rf'\g<1>{_tag(python.oldest)}"', project)
    project = re.sub(r'(?m)^(python_version = ")[\d.]+"', rf'\g<1>{python.oldest}"', project)
    label = '    "Programming Language :: Python :: '
    labels = "".join(f'{label}{release}",\n' for release in _minors(python))
    project = re.sub(rf'(?:{re.escape(label)}\d+\.\d+",\n)+', labels, project)
    for each in LIBRARIES:
        name, _, range_ = each.requirement.partition(">=")
        asked = rf'"{re.escape(name)}(\[[\w,-]+\])?>=[^"]*"'
        project = re.sub(asked, rf'"{name}\g<1>>={range_}"', project)
    return project


def _minors(python: Library) -> list[str]:
    """Every minor release in the range, such as 3.11, 3.12, 3.13."""
    first, last = (int(end.partition(".")[2]) for end in (python.oldest, python.newest))
    return [f"3.{minor}" for minor in range(first, last + 1)]


def _tag(release: str) -> str:
    return release.replace(".", "")


def _filled(text: str, begin: str, end: str, table: str) -> str:
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"no place for the tables: {begin} ... {end}")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))
    for project in PROJECTS:
        project.write_text(with_versions(project.read_text()))
