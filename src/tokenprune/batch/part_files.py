"""Answers on disk: part files that a kill cannot damage, and the file they are joined into."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..folders import PassedOver
from .errors import ResumeError
from .job import Job

if TYPE_CHECKING:
    import pyarrow as pa

STRINGS = ("id", "image", "prompt", "answer", "error")
JOINED = 2**16  # rows that are written into the output at once
COLUMNS = ("id", "image", "prompt", "answer", "tokens_before", "tokens_after", "error")


@dataclass
class Parts:
    """The answers of a job so far.

    Every file is written under another name, flushed to the disk and renamed, so that it is there
    as a whole or not at all. Its name comes from the job and the ids of its rows.

    Attributes:
        output: the file that all parts are joined into.
        job: whose answers these are.
        rows: answers in one file, and the most that a kill can lose.
    """

    output: Path
    job: Job
    rows: int = 256
    _waiting: list[pa.Table] = field(default_factory=list)
    _known: set[str] = field(default_factory=set)

    @property
    def folder(self) -> Path:
        """Where the parts are."""
        return folder_of(self.output)

    def pending(self, table: pa.Table) -> pa.Table:
        """The rows of `table` that have no answer yet."""
        import pyarrow as pa
        import pyarrow.compute as pc

        done = [each.column("id").combine_chunks() for each in self._written(["id"])]
        self._known = {key for ids in done for key in ids.to_pylist()}
        known = pa.array(self._known, pa.string())
        return table.filter(pc.invert(pc.is_in(table.column("id"), value_set=known)))

    def add(self, answers: Mapping[str, Sequence[object]]) -> int:
        """Take answers; returns how many are new. Rows that come twice are taken once."""
        table = _table(answers)
        fresh = [key not in self._known for key in answers["id"]]
        if not all(fresh):  # a worker that died after it answered may be asked again
            table = table.filter(fresh)
        self._known.update(map(str, answers["id"]))
        self._waiting.append(table)
        if sum(map(len, self._waiting)) >= self.rows:
            self.flush()
        return len(table)

    def flush(self) -> None:
        """Write what waits."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        waiting, self._waiting = self._waiting, []
        if sum(map(len, waiting)):
            table = pa.concat_tables(waiting)
            ids = "\n".join(table.column("id").to_pylist())
            named = hashlib.sha256(f"{self.job.fingerprint}\n{ids}".encode()).hexdigest()[:20]
            path = self.folder / f"part-{named}.parquet"
            _replace(path, lambda unfinished: pq.write_table(table, unfinished), self.folder)

    def join(self, table: pa.Table, passed_over: PassedOver = ()) -> None:
        """Write the output, in the order of `table`, every row once.

        Args:
            table: the rows.
            passed_over: files that belong to no row, and why; noted in the file's metadata.
        """
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        self.flush()
        # Columns of more than 2 GiB of text can be picked from as large strings alone.
        large = _schema(pa.large_string())
        found = [large.empty_table(), *(part.cast(large) for part in self._written())]
        answers = pa.concat_tables(found).combine_chunks()
        ids = table.column("id").cast(pa.large_string())
        places = pc.index_in(ids, value_set=answers.column("id").combine_chunks())
        if places.null_count:
            lost = table.filter(pc.is_null(places)).column("id").slice(0, 3).to_pylist()
            raise ResumeError(
                f"{places.null_count} rows came back without an answer, {lost} among them; the "
                f"others are in {self.folder}: run the same command again"
            )
        places = places.combine_chunks()
        notes = {"tokenprune": self.job.written, "passed_over": json.dumps(passed_over)}
        schema = _schema(pa.string()).with_metadata(notes)

        def write(unfinished: Path) -> None:
            with pq.ParquetWriter(unfinished, schema) as file:
                for start in range(0, len(places), JOINED):
                    some = answers.take(places.slice(start, JOINED))
                    file.write_table(some.cast(schema))

        _replace(self.output, write, self.folder)

    def _written(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        import pyarrow.parquet as pq

        for path in sorted(self.folder.glob("part-*.parquet")):
            yield pq.read_table(path, columns=columns)


def finished(output: Path, job: Job) -> bool:
    """Whether `output` holds the answers of `job`.

    Raises:
        ResumeError: it holds something else.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not output.exists():
        return False
    other = f"{output} is there already, and "
    choose = "; choose another --output, or remove it"
    try:
        notes = pq.read_schema(output).metadata or {}
        made_by = Job.read(notes[b"tokenprune"].decode())
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        raise ResumeError(f"{other}this command did not write it{choose}") from error
    if made_by != job:
        raise ResumeError(f"{other}holds other answers: {job.unlike(made_by)}{choose}")
    return True


@contextmanager
def opened(output: Path, job: Job, rows: int = 256) -> Iterator[Parts]:
    """The parts of a job, begun or begun anew; nobody else can write them meanwhile.

    Raises:
        ResumeError: the parts there are of another job, or another process is at work on them.
    """
    folder = folder_of(output)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        note = folder / "job.json"
        if note.exists():
            try:
                begun = Job.read(note.read_text())
            except (ValueError, TypeError) as error:
                raise ResumeError(
                    f"{folder} holds parts of another version of tokenprune; choose another "
                    "--output, or remove that folder"
                ) from error
            if begun != job:
                raise ResumeError(
                    f"{folder} holds parts of other work: {job.unlike(begun)}; choose another "
                    "--output, or remove that folder"
                )
        else:
            _replace(note, lambda path: path.write_text(job.written), folder)
        for left in folder.glob("*.tmp"):  # of a writer that was killed
            left.unlink()
        yield Parts(output, job, rows)


def folder_of(output: Path) -> Path:
    """Where the parts of `output` are."""
    return output.with_name(output.name + ".parts")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A lock that goes when its process goes, however; none where the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResumeError(f"another process is writing {folder}") from error
        except OSError:  # some network file systems have none
            pass
        yield


def _table(answers: Mapping[str, Sequence[object]]) -> pa.Table:
    """Answers with the types of the output."""
    import pyarrow as pa

    schema = _schema(pa.string())
    return pa.table([pa.array(answers[each.name], each.type) for each in schema], schema=schema)


def _schema(text: pa.DataType) -> pa.Schema:
    """Of the output, with `text` for its strings."""
    import pyarrow as pa

    return pa.schema([(name, text if name in STRINGS else pa.int32()) for name in COLUMNS])


def _replace(path: Path, write: Callable[[Path], object], folder: Path) -> None:
    """Let `write` make a file in `folder` which becomes `path` when it is whole and on the disk."""
    unfinished = folder / f"{path.name}.{os.getpid()}.tmp"
    write(unfinished)
    with unfinished.open("r+b") as file:  # some systems flush only what may be written
        os.fsync(file.fileno())
    unfinished.replace(path)
