"""Exit codes of lmms-eval: what went wrong must not look like an evaluation that scored zero."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class EvaluationFailedError(SystemExit):
    """Exit of lmms-eval with code 1, the reason on stderr; the cause is chained.

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


def end_with_the_command() -> None:
    """Make lmms-eval's command end with code 1 wherever it prints an error and would end with 0.

    It does so for everything that goes wrong outside of the model: a data set that cannot be
    loaded, a metric that fails. All that can be seen of it from here is the line that is logged
    then, and an exception that leaves a sink of loguru ends what logged. `simple_evaluate`, called
    from Python, logs no such line; it raises.
    """
    from loguru import logger  # type: ignore[import-not-found]

    logger.add(_end, level="ERROR", format="{message}", filter=_is_the_commands, catch=False)


def _is_the_commands(record: Any) -> bool:
    return bool(record["function"] == "cli_evaluate")


def _end(message: object) -> None:
    raise EvaluationFailedError(f"tokenprune: nothing was scored. {str(message).strip()}")
