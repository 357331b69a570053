"""Run of a job: rows in, a file of answers out, resumed where it was left."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from .answerer import Answerer
from .job import Job
from .part_files import finished, folder_of, opened
from .rows import Rows
from .workers import Engine


def answer_all(
    answerer: Answerer,
    rows: Rows,
    output: Path,
    engine: Engine,
    *,
    save_every: int = 256,
    progress: Callable[[int, int], object] = lambda done, bad: None,
) -> None:
    """Write the answers to `rows` into `output`, a parquet file, those of an earlier run included.

    Answers are kept in a folder beside it until all are there. A run that was killed goes on where
    it was when this is called again.

    Args:
        answerer: answerer that gives the answers; its `root` must be that of `rows`.
        rows: rows to answer.
        output: file to write.
        engine: where answers are computed.
        save_every: answers in a part file, and the most that a kill can lose.
        progress: called now and then with the rows that have an answer or an error, and with how
            many of those of this run have an error.

    Raises:
        ResumeError: `output`, or what is left of an earlier run, belongs to other work.
    """
    job = Job.of(answerer, rows)
    if finished(output, job):
        progress(len(rows.table), 0)
    else:
        with opened(output, job, save_every) as parts:
            pending = parts.pending(rows.table)
            done, bad = len(rows.table) - len(pending), 0
            progress(done, bad)
            answered = engine.answers(answerer, pending) if len(pending) else ()
            try:
                for answers in answered:
                    done += parts.add(answers)
                    bad += sum(error is not None for error in answers["error"])
                    progress(done, bad)
            finally:  # what is there is worth keeping, whatever went wrong
                parts.flush()
            parts.join(rows.table, rows.passed_over)
    # Not under the lock, which is in there: network file systems keep a folder with an open file.
    shutil.rmtree(folder_of(output), ignore_errors=True)
