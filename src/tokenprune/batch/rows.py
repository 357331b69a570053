"""Rows of pictures and prompts from a folder of pictures, JSON lines or parquet files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..folders import PassedOver, files_of, list_pictures
from .cells import COLUMN, cell_name, is_cell
from .errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

SHARDS = frozenset((".jsonl", ".ndjson", ".parquet"))
PROMPTS = ("prompt", "question")
NAMED = 3  # files that an error names


@dataclass(frozen=True)
class Rows:
    """Rows to answer, read when they are needed.

    Attributes:
        table: strings `id`, `image` (a name, see `picture_of`; or null) and `prompt`, one row each.
        root: absolute folder that names of pictures are relative to.
        stamp: changes when rows, or the parquet files with pictures, change.
        passed_over: files of the folder that belong to no row, and why, in order.
    """

    table: pa.Table
    root: str
    stamp: str
    passed_over: PassedOver = ()


def read_rows(source: Path, prompt: str | None = None) -> Rows:
    """The rows of a folder of pictures, of JSON lines or a parquet file, or a folder of such files.

    Pictures of a folder are rows with the file's name as id, those without an ending too; files
    that belong to no row are in `passed_over`. JSON lines and parquet files have `image`, `prompt`
    (or `question`) and `id`; a row without an id gets the name of its file and its number, as in
    ``"cats.jsonl#17"``. Pictures themselves are not read.

    Args:
        source: what to read.
        prompt: for rows that have none.

    Raises:
        InputError: nothing that can be read, an id that comes twice, a row without a prompt.
    """
    import pyarrow as pa

    source = source.expanduser().resolve()
    if not source.exists():
        raise InputError(f"there is no {source}; give a folder of pictures, .jsonl or .parquet")
    root = source if source.is_dir() else source.parent
    shards = sorted(_shards(source))
    passed_over: PassedOver = ()
    if shards:
        found = [row for shard in shards for row in _rows(shard, root)]
    elif source.is_dir():
        listing = list_pictures(source)
        passed_over = tuple(map(_said_of_shards, listing.passed_over))
        found = [(name, name, None) for name in listing.pictures]
    else:
        raise InputError(f"{source.name} is no .jsonl, no .parquet and no folder of pictures")
    if not found:
        named = "".join(f"; passed over {name}: {why}" for name, why in passed_over[:NAMED])
        raise InputError(f"{source} has no rows: no pictures, no .jsonl, no .parquet{named}")
    filled = [(key, image, prompt if own is None else own) for key, image, own in found]
    _check(filled)
    _check_unicode(filled)
    ids, images, prompts = zip(*filled, strict=True)
    if shards and source.is_dir():
        passed_over = _beside(source, shards, images)
    columns = {"id": ids, "image": images, "prompt": prompts}
    table = pa.table({name: pa.array(column, pa.string()) for name, column in columns.items()})
    return Rows(table, str(root), _stamp(table, shards), passed_over)


def _shards(source: Path) -> Iterator[Path]:
    for path in source.iterdir() if source.is_dir() else [source]:
        if path.suffix.lower() in SHARDS and not path.name.startswith("."):
            if path.is_symlink() and not path.exists():
                raise InputError(f"{path.name} is a link to nothing; mend it, or take it away")
            if path.is_file():
                yield path


def _said_of_shards(passed_over: tuple[str, str]) -> tuple[str, str]:
    """What `list_pictures` says, but rows in a folder below are not what it takes them for."""
    path = Path(passed_over[0])
    if path.suffix.lower() not in SHARDS or path.name.startswith("."):
        return passed_over
    return passed_over[0], "rows are read from files of the folder itself, not from folders below"


def _beside(folder: Path, shards: list[Path], images: Sequence[str | None]) -> PassedOver:
    """Files of `folder` that hold no rows and that no row names, with reasons."""
    known = {os.path.normpath(folder / image) for image in images if image is not None}
    known |= {str(shard) for shard in shards}
    cells = any(image is not None and is_cell(image) for image in images)
    why = "rows are read from .jsonl and .parquet files of the folder itself, and none names it"
    if cells:
        why = "no row names it by a text (what cells of parquet files hold is read later)"
    left = [(n, w or why) for n, w in files_of(folder) if str(folder / n) not in known]
    return tuple(sorted(left))


_Row = tuple[str, "str | None", "str | None"]


def _rows(shard: Path, root: Path) -> Iterator[_Row]:
    """Id, picture and prompt of every row of a file."""
    reader = _parquet_rows if shard.suffix.lower() == ".parquet" else _json_rows
    name = shard.relative_to(root).as_posix()
    for number, key, image, prompt in reader(shard, name):
        yield cell_name(name, number) if key is None else key, image, prompt


def _json_rows(shard: Path, name: str) -> Iterator[tuple[int, str | None, str | None, str | None]]:
    with shard.open("rb") as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode())
            except ValueError as error:  # also where it is not UTF-8
                raise InputError(f"line {number + 1} of {name} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise InputError(f"line {number + 1} of {name} must be an object, got {row!r:.60}")
            yield number, _text(row.get("id")), _text(row.get(COLUMN)), _text(_prompt(row))


def _parquet_rows(
    shard: Path, name: str
) -> Iterator[tuple[int, str | None, str | None, str | None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(shard) as file:
            schema = file.schema_arrow
            if COLUMN not in schema.names:
                raise InputError(f"{name} has no column {COLUMN!r}, only {', '.join(schema.names)}")
            kind = schema.field(COLUMN).type
            named = pa.types.is_string(kind) or pa.types.is_large_string(kind)
            wanted = [column for column in ("id", *PROMPTS) if column in schema.names]
            number = 0
            for batch in file.iter_batches(columns=[*wanted, *([COLUMN] if named else [])]):
                # Without any column to read, a batch still knows how many rows it has.
                for row in batch.to_pylist() if batch.num_columns else [{}] * batch.num_rows:
                    image = row[COLUMN] if named else cell_name(name, number)
                    yield number, _text(row.get("id")), image, _text(_prompt(row))
                    number += 1
    except (OSError, UnicodeError, pa.ArrowException) as error:
        raise InputError(f"cannot read {name}: {error}") from error


def _prompt(row: dict[str, Any]) -> object:
    return next((row[name] for name in PROMPTS if row.get(name) is not None), None)


def _text(value: object) -> str | None:
    if isinstance(value, bytes):  # parquet files of some writers do not say that it is text
        return value.decode()
    return None if value is None else str(value)


def _check(rows: list[_Row]) -> None:
    seen: dict[str, int] = {}
    for number, (key, _, prompt) in enumerate(rows):
        if key in seen:
            raise InputError(
                f"rows {seen[key]} and {number} have the same id {key!r}; "
                "answers are told apart by id"
            )
        if prompt is None:
            raise InputError(f"row {key!r} has no prompt; give one for such rows: --prompt TEXT")
        seen[key] = number


def _check_unicode(rows: list[_Row]) -> None:
    """Refuse text that no file of answers can hold, such as file names that are not UTF-8."""
    for row in rows:
        for text in row:
            try:
                (text or "").encode()
            except UnicodeEncodeError:
                raise InputError(
                    f"{text!r} is not Unicode text, so the output cannot hold it; rename that "
                    "file, or mend that row"
                ) from None


def _stamp(table: pa.Table, shards: list[Path]) -> str:
    digest = hashlib.sha256()
    for column in table.columns:
        digest.update(json.dumps(column.to_pylist()).encode())
    for shard in shards:
        if shard.suffix.lower() == ".parquet":  # pictures inside are not among the columns
            about = shard.stat()
            digest.update(f"{shard.name} {about.st_size} {about.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
