"""Rows are read from folders, JSON lines and parquet files."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tokenprune_adapters.batch import InputError, PictureError
from tokenprune_adapters.batch.pictures import picture_of
from tokenprune_adapters.batch.rows import Rows, read_rows


def paint(path: Path, red: int) -> bytes:
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", (2, 2), (red, 0, 0)).save(path)
    return path.read_bytes()


def reds(rows: Rows) -> list[int]:
    names = rows.table.column("image").to_pylist()
    return [picture_of(name, rows.root).getpixel((0, 0))[0] for name in names]


def json_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    paint(tmp_path / "b.PNG", 2)
    paint(tmp_path / "a" / "z.png", 1)
    paint(tmp_path / ".hidden.png", 3)
    (tmp_path / "readme.txt").write_text("no picture")
    rows = read_rows(tmp_path, "what ?")
    assert rows.table.to_pydict() == {
        "id": ["a/z.png", "b.PNG"],
        "image": ["a/z.png", "b.PNG"],
        "prompt": ["what ?", "what ?"],
    }
    assert reds(rows) == [1, 2]


def test_json_lines(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", 1)
    file = json_lines(
        tmp_path / "rows.jsonl",
        {"id": 7, "image": "a.png", "question": "how many ?"},
        {"image": "a.png", "prompt": "what ?", "question": "not this"},
        {"id": "no picture"},
    )
    file.write_text(file.read_text().replace("\n", "\n\n", 1))  # empty lines are none
    rows = read_rows(file, "else ?")
    assert rows.table.to_pydict() == {
        "id": ["7", "rows.jsonl#2", "no picture"],
        "image": ["a.png", "a.png", None],
        "prompt": ["how many ?", "what ?", "else ?"],
    }


@pytest.mark.parametrize("form", ["bytes", "mapping", "name"])
def test_parquet_files(tmp_path: Path, form: str) -> None:
    data = [paint(tmp_path / f"{red}.png", red) for red in range(5)]
    images = {
        "bytes": data,
        "mapping": [
            {"bytes": None if n == 2 else d, "path": f"{n}.png"} for n, d in enumerate(data)
        ],
        "name": [f"{red}.png" for red in range(5)],
    }[form]
    pq.write_table(pa.table({"image": images}), tmp_path / "one.parquet", row_group_size=2)
    pq.write_table(
        pa.table({"id": [10, 11], "image": images[:2], "question": ["a", None], "more": [0, 0]}),
        tmp_path / "two.parquet",
    )
    rows = read_rows(tmp_path, "what ?")
    assert rows.table.column("id").to_pylist() == [
        *(f"one.parquet#{row}" for row in range(5)),
        "10",
        "11",
    ]
    assert rows.table.column("prompt").to_pylist() == ["what ?"] * 5 + ["a", "what ?"]
    assert reds(rows) == [0, 1, 2, 3, 4, 0, 1]


def test_cells_that_are_not_there(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x", None]}), tmp_path / "a.parquet")
    for name, words in {
        "a.parquet#0": "cannot read a picture from its bytes",
        "a.parquet#1": "no picture",
        "a.parquet#2": "cannot read .*a.parquet#2",
        "b.parquet#0": "cannot read .*b.parquet#0",
    }.items():
        with pytest.raises(PictureError, match=words):
            picture_of(name, str(tmp_path))
    pq.write_table(pa.table({"image": ["a.parquet#0"]}), tmp_path / "c.parquet")
    with pytest.raises(PictureError, match="the name of another cell"):
        picture_of("c.parquet#0", str(tmp_path))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [{"id": 1, "prompt": "a"}, {"id": "1", "prompt": "b"}],
            "rows 0 and 1 have the same id '1'",
        ),
        ([{"id": "x"}], "row 'x' has no prompt; give one for such rows: --prompt TEXT"),
        ([[1, 2]], r"line 1 of rows.jsonl must be an object, got \[1, 2\]"),
        ([], "has no rows"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, rows: list[object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_rows(json_lines(tmp_path / "rows.jsonl", *rows))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    cut = tmp_path / "rows.jsonl"
    cut.write_text('{"id": 1, "prompt": "a"}\n{"id": 2,')
    with pytest.raises(InputError, match="line 2 of rows.jsonl is not JSON"):
        read_rows(cut)
    with pytest.raises(InputError, match="there is no .*none"):
        read_rows(tmp_path / "none")
    (tmp_path / "a.txt").touch()
    with pytest.raises(InputError, match=r"a.txt is no .jsonl, no .parquet and no folder"):
        read_rows(tmp_path / "a.txt")
    bad = tmp_path / "bad.parquet"
    bad.write_text("no")
    with pytest.raises(InputError, match="cannot read bad.parquet"):
        read_rows(bad)
    pq.write_table(pa.table({"picture": [1]}), bad)
    with pytest.raises(InputError, match="bad.parquet has no column 'image', only picture"):
        read_rows(bad)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="has no rows"):
        read_rows(empty)


def test_the_stamp_changes_with_the_rows(tmp_path: Path) -> None:
    file = json_lines(tmp_path / "rows.jsonl", {"image": "a.png", "prompt": "a"})
    stamp = read_rows(file).stamp
    assert read_rows(file, "unused").stamp == stamp
    json_lines(file, {"image": "a.png", "prompt": "b"})
    assert read_rows(file).stamp != stamp
    shard = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"image": [b"1"]}), shard)
    stamp = read_rows(shard, "a").stamp
    pq.write_table(pa.table({"image": [b"22"]}), shard)
    assert read_rows(shard, "a").stamp != stamp
