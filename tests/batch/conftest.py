from __future__ import annotations

from pathlib import Path

import pytest

from support.batch import alone, write_rows

pytest.importorskip("pyarrow")


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON lines with 12 questions about 6 pictures beside them. Do not change them."""
    return write_rows(tmp_path_factory.mktemp("batch") / "rows", 12)


@pytest.fixture(scope="session")
def expected(rows_file: Path) -> dict[str, str]:
    """What the compressed model answers, one prompt at a time."""
    return alone(rows_file)
