"""The `tokenprune` command. It needs the extra `cli`; the rest of the package does not."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..errors import TokenpruneError

NEEDED = ("typer", "rich", "PIL")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; what went wrong is said in one line (exit code 2)."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in NEEDED:
            raise
        _give_up(
            f"the command line needs {error.name}, which is not installed; "
            "pip install 'tokenprune-vlm[cli]'"
        )
    try:
        app(args=None if arguments is None else list(arguments))
    except TokenpruneError as error:
        _give_up(str(error))


def _give_up(reason: str) -> None:
    sys.stderr.write(f"tokenprune: {reason}\n")
    sys.exit(2)
