"""`python -m tokenprune.testing` prints the promises as they stand in docs/contract.md."""

from __future__ import annotations

import sys

from .kit import SECTIONS
from .promises import CHECKS, OPTIONAL


def lines() -> list[str]:
    """One section per kind of subject, one line per promise."""
    written = []
    for section in SECTIONS:
        title = (section.__doc__ or "").partition("\n")[0].partition(": ")[2].rstrip(".")
        written += ["", f"## {title[:1].upper()}{title[1:]}", ""]
        for check in CHECKS.values():
            if check.function.__module__ == section.__name__:
                optional = " *(optional)*" if check.number in OPTIONAL else ""
                written.append(f"- **{check.number}**{optional} {check.states}")
    return written[1:]


if __name__ == "__main__":
    sys.stdout.write("\n".join(lines()) + "\n")
