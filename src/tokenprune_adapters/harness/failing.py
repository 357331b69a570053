"""An evaluation that went wrong must not look like one that scored zero."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


class EvaluationFailedError(SystemExit):
    """Ends lmms-eval with exit code 1, the reason on stderr; the cause is chained.

    It is no `Exception`, because lmms-eval catches those: around `generate` they become an empty
    answer, and around a whole evaluation its command prints them and ends with exit code 0.
    """


@contextmanager
def fatal(doing: str) -> Iterator[None]:
    """Make every exception inside end the process, after its traceback."""
    try:
        yield
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        raise EvaluationFailedError(
            f"tokenprune: {doing} failed: {type(error).__name__}: {error}"
        ) from error
