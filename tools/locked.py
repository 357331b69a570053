"""Check that fails when a package is installed that the lock does not name at that version.

Run it in the environment: `.venv/bin/python tools/locked.py requirements/lock.txt`.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXAMPLES = {"tokenprune-pocketvlm", "tokenprune-quilt", "tokenprune-sharpness"}
OURS = {"tokenprune-vlm", *EXAMPLES}


def requirements(lock: str) -> dict[str, Requirement]:
    """Lines of a lock that hold for this Python on this machine, by name."""
    lines = (line.partition("#")[0].strip() for line in lock.splitlines())
    known = (Requirement(line) for line in lines if line)
    return {
        canonicalize_name(each.name): each
        for each in known
        if each.marker is None or each.marker.evaluate()
    }


def strangers(installed: dict[str, str], lock: str) -> list[str]:
    """A sentence for every installed package that `lock` does not name at its version.

    A build of torch for CPUs, such as 2.14.1+cpu, is version 2.14.1.
    """
    known, told = requirements(lock), []
    for name, version in sorted(installed.items()):
        if name in OURS:
            continue
        if name not in known:
            told.append(f"{name} {version} is not in the lock")
        elif not known[name].specifier.contains(version, prereleases=True):
            told.append(f"{name} {version} is installed, the lock says {known[name].specifier}")
    return told


def installed() -> dict[str, str]:
    """Versions of the packages in this environment, by name."""
    return {canonicalize_name(each.name): each.version for each in metadata.distributions()}


if __name__ == "__main__":
    told = strangers(installed(), Path(sys.argv[1]).read_text())
    if told:
        what_to_do = (
            "packages were added by hand: remove the environment (`make clean`) and run make again;"
            "\na requirement in pyproject.toml is new: `make lock`"
        )
        sys.exit("\n".join([*told, what_to_do]))
