from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from support.batch import alone, write_rows

ROWS = 40


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A real Ray on this machine. Actors are idle most of the time, so it has CPUs to spare."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init("local", num_cpus=6, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """JSON lines with 40 questions about 20 pictures beside them."""
    return write_rows(tmp_path / "rows", ROWS)


@pytest.fixture
def expected(rows_file: Path) -> dict[str, str | None]:
    """What the compressed model answers, one prompt at a time, in this process."""
    return dict(alone(rows_file))
