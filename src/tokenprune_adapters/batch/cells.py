"""Pictures inside parquet files, named by file and row, so that bytes are read where needed.

Rows travel between processes and machines by name; a worker that gets neighbouring rows reads
each row group once.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate

from .errors import PictureError

COLUMN = "image"

_CELL = re.compile(r"(.+\.parquet)#(\d+)", re.DOTALL)


def cell_name(shard: str, row: int) -> str:
    """The name of a cell, which also names rows of other files that have no id.

    >>> cell_name("cats/0001.parquet", 17)
    'cats/0001.parquet#17'
    """
    return f"{shard}#{row}"


def is_cell(name: str) -> bool:
    """Whether `name` is that of a cell, and not of a file."""
    return _CELL.fullmatch(name) is not None


def cell(name: str) -> object:
    """What a cell holds: bytes, or a mapping with `bytes` or `path`, or None.

    Raises:
        PictureError: the file or the row is not there.
    """
    found = _CELL.fullmatch(name)
    if found is None:
        raise PictureError(f"{name!r} is not a file name, '#' and a row")
    shard, row = found.group(1), int(found.group(2))
    try:
        starts = _starts(shard)
        group = bisect_right(starts, row) - 1
        value: object = _row_group(shard, group)[row - starts[group]].as_py()
    except (OSError, ValueError, KeyError, IndexError) as error:  # Arrow's errors are among them
        raise PictureError(f"cannot read {name}: {error}") from error
    return value


@lru_cache(maxsize=16)
def _starts(shard: str) -> list[int]:
    """The first row of every row group, and the number of rows."""
    import pyarrow.parquet as pq

    meta = pq.read_metadata(shard)
    sizes = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
    return [0, *accumulate(sizes)]


@lru_cache(maxsize=1)
def _row_group(shard: str, group: int):  # type: ignore[no-untyped-def]  # a pyarrow.ChunkedArray
    """The pictures of one row group."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(shard) as file:
        return file.read_row_group(group, columns=[COLUMN]).column(COLUMN)
