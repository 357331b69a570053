"""Pictures inside parquet files, named by file and row, so that bytes are read where needed.

Rows travel between processes and machines by name; a worker that gets rows in their order reads
each row group once, and holds a few of its pictures at a time: a row group may be a whole file, and
larger than the memory.
"""

from __future__ import annotations

import re
import threading
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

from .errors import PictureError

if TYPE_CHECKING:
    import pyarrow as pa

COLUMN = "image"
HELD = 32
"""Pictures of a file that are in memory at once, where its pages are not larger."""

_CELL = re.compile(r"(.+\.parquet)#(\d+)", re.DOTALL | re.IGNORECASE)
_BUFFER = 2**20  # bytes; without one, a whole column of the row group is read ahead


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
        if row >= starts[-1]:
            raise IndexError(f"it has {starts[-1]} rows")
        group = bisect_right(starts, row) - 1
        with _one_at_a_time:
            return _row_group(shard, group).at(row - starts[group])
    except (OSError, ValueError, KeyError, IndexError) as error:  # Arrow's errors are among them
        _row_group.cache_clear()  # what stopped at damage does not go on behind it
        raise PictureError(f"cannot read {name}: {error}") from error


@lru_cache(maxsize=16)
def _starts(shard: str) -> list[int]:
    """The first row of every row group, and the number of rows."""
    import pyarrow.parquet as pq

    meta = pq.read_metadata(shard)
    sizes = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
    return [0, *accumulate(sizes)]


class _RowGroup:
    """The pictures of a row group, read forwards; turning back begins anew."""

    def __init__(self, shard: str, group: int) -> None:
        import pyarrow.parquet as pq

        self.file = pq.ParquetFile(shard, buffer_size=_BUFFER)
        self.group = group
        self.first = 0
        self.held: Sequence[pa.Scalar] = ()
        self._begin()

    def at(self, row: int) -> object:
        """What row `row` of the group holds."""
        if row < self.first:
            self._begin()
        while row >= self.first + len(self.held):
            self.first += len(self.held)
            self.held = next(self.batches).column(COLUMN)
        return self.held[row - self.first].as_py()

    def _begin(self) -> None:
        self.batches = self.file.iter_batches(HELD, row_groups=[self.group], columns=[COLUMN])
        self.first, self.held = 0, ()


_row_group = lru_cache(maxsize=1)(_RowGroup)
_one_at_a_time = threading.Lock()  # the next one reads on from where this one stopped
