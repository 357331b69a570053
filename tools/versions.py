"""Printer of the table of tested versions, for the Makefile; needs nothing but Python.

Commands:
    cells: the environments of `make matrix`.
    oldest NAME, newest NAME: an end of what was tested, such as 2.6 of torch.
    found: what is installed, beside what was tested.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

TABLE = Path(__file__).parents[1] / "src" / "tokenprune" / "versions.py"


def table() -> ModuleType:
    """The module with the table, without the rest of its package, which needs torch."""
    spec = importlib.util.spec_from_file_location("tokenprune_versions", TABLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def cells() -> list[str]:
    """Names of the environments: one a release of transformers, then both ends of the rest."""
    releases = table().library("transformers").releases
    return [*(f"transformers-{release}" for release in releases), "lowest", "highest"]


def found() -> list[str]:
    """A line for every library of the table that is installed."""
    return [
        f"{each.name} {each.found} (tested: {each.span})"
        for each in table().LIBRARIES
        if each.found is not None
    ]


def main(words: list[str]) -> str:
    """What one of the commands above prints."""
    match words:
        case ["cells"]:
            return " ".join(cells())
        case ["found"]:
            return "\n".join(found())
        case ["oldest" | "newest" as end, name]:
            return str(getattr(table().library(name), end))
    raise SystemExit(f"{__doc__}\nnot one of these: {' '.join(words)}")


if __name__ == "__main__":
    print(main(sys.argv[1:]))  # noqa: T201
