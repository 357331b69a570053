"""Requirements of this project's extras, a line each, without the project itself.

`python tools/requirements.py eval` is for an environment that has the project already, `python
tools/requirements.py --bare dev` for one with the newest release of everything: names alone.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def of_extras(project: dict[str, Any], extras: list[str]) -> list[str]:
    """Requirements of `extras`, in order and without repetition."""
    asked: dict[str, None] = {}
    for extra in extras:
        for requirement in project["optional-dependencies"][extra]:
            ours = re.fullmatch(rf"{project['name']}\[(.*)\]", requirement)
            wanted = of_extras(project, ours[1].split(",")) if ours else [requirement]
            asked |= dict.fromkeys(wanted)
    return list(asked)


def bare(requirement: str) -> str:
    """Name of a requirement, with its extras and without versions.

    >>> bare("ray[data]>=2.50,<2.61")
    'ray[data]'
    """
    return re.split(r"[<>=!~; ]", requirement, maxsplit=1)[0]


def main(words: list[str]) -> str:
    """What the commands above print; `--bare` adds what the project itself always needs."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    if words[:1] == ["--bare"]:
        asked = [*project["dependencies"], *of_extras(project, words[1:])]
        return "\n".join(dict.fromkeys(map(bare, asked)))
    return "\n".join(of_extras(project, words))


if __name__ == "__main__":
    print(main(sys.argv[1:]))  # noqa: T201
