"""Rows are read from folders, JSON lines and parquet files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image
from transformers.image_utils import load_image

from tokenprune.batch import InputError, PictureError, cells
from tokenprune.batch.pictures import picture_of
from tokenprune.batch.rows import Rows, read_rows
from tokenprune.bench.data import Sample
from tokenprune.pictures import read_picture


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
    assert rows.passed_over == (
        (".hidden.png", "its name begins with a dot"),
        ("readme.txt", "it does not begin as pictures of common formats do"),
    )


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


def test_names_that_are_not_unicode(tmp_path: Path) -> None:
    paint(tmp_path / "été 🙂.png", 1)
    assert reds(read_rows(tmp_path, "what ?")) == [1]
    try:
        paint(tmp_path / os.fsdecode(b"caf\xe9.png"), 2)
    except OSError:
        pytest.skip("this file system has no such names")
    with pytest.raises(InputError, match=r"'caf\\udce9.png' is not Unicode text.*rename that file"):
        read_rows(tmp_path, "what ?")
    with pytest.raises(InputError, match="is not Unicode text"):
        read_rows(json_lines(tmp_path / "rows.jsonl", {"image": "\ud800.png", "prompt": "a"}))


def test_text_that_a_parquet_file_has_as_bytes(tmp_path: Path) -> None:
    texts = {"id": [b"a"], "image": ["a.png"], "prompt": ["été ?".encode()]}
    pq.write_table(pa.table(texts), tmp_path / "a.parquet")
    rows = read_rows(tmp_path / "a.parquet").table
    assert rows.to_pylist() == [{"id": "a", "image": "a.png", "prompt": "été ?"}]
    pq.write_table(pa.table(texts | {"id": [b"\xff"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"cannot read a.parquet: 'utf-8' codec"):
        read_rows(tmp_path / "a.parquet")


@pytest.mark.parametrize("ending", ["parquet", "PARQUET"])
def test_a_row_group_is_read_forwards_a_few_pictures_at_a_time(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any order, and without the whole of it in memory."""
    monkeypatch.setattr(cells, "HELD", 3)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", None)
    data = [paint(tmp_path / f"{red}.png", red) for red in range(17)]
    table = pa.table({"image": [{"bytes": each, "path": None} for each in data]})
    pq.write_table(table, tmp_path / f"one.{ending}", row_group_size=10)
    rows = read_rows(tmp_path / f"one.{ending}", "what ?")
    names = rows.table.column("image").to_pylist()
    for order in (range(17), [16, 3, 4, 2, 12, 12, 9, 0], range(0, 17, 4)):
        asked = [picture_of(names[row], rows.root).getpixel((0, 0))[0] for row in order]
        assert asked == list(order)


def test_pictures_behind_damage_are_bad_one_by_one(tmp_path: Path) -> None:
    file, data = tmp_path / "a.parquet", [paint(tmp_path / "a.png", red) for red in range(96)]
    pages = {"use_dictionary": False, "write_batch_size": 32, "data_page_size": 1}
    pq.write_table(pa.table({"image": data}), file, compression="none", **pages)
    written = bytearray(file.read_bytes())
    header = written.index(data[63]) + len(data[63])  # of the third page
    written[header : header + 20] = b"\xff" * 20
    file.write_bytes(written)
    for row in (0, 63):
        picture_of(f"{file}#{row}")
    for row in (64, 65, 95):
        with pytest.raises(PictureError, match=f"cannot read .*#{row}: .*\n.*page header"):
            picture_of(f"{file}#{row}")
    picture_of(f"{file}#1")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(tmp_path: Path, orientation: int) -> None:
    """Whatever a camera says of how it was held; as transformers opens pictures."""
    image = Image.new("RGB", (3, 2))
    for place in range(6):
        image.putpixel((place % 3, place // 3), (place, 0, 0))
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = orientation
    for kind in ("png", "tiff"):
        image.save(tmp_path / f"a.{kind}", exif=exif)
        wanted = load_image(str(tmp_path / f"a.{kind}"))
        data = (tmp_path / f"a.{kind}").read_bytes()
        opened = Image.open(tmp_path / f"a.{kind}")
        forms = (f"a.{kind}", data, {"bytes": data}, opened)
        pictures = [picture_of(form, str(tmp_path)) for form in forms]
        pictures += [read_picture(tmp_path / f"a.{kind}")]  # of `tokenprune run`
        pictures += [Sample("1", tmp_path / f"a.{kind}", "what ?").picture()]  # and of `bench`
        for found in pictures:
            assert (found.size, found.tobytes()) == (wanted.size, wanted.tobytes())


def test_a_picture_whose_exif_data_is_damaged_is_a_picture(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png", exif=b"Exif\0\0no such thing")
    with pytest.raises(SyntaxError):
        Image.open(tmp_path / "a.png").getexif()
    assert picture_of("a.png", str(tmp_path)).size == (3, 2)


@pytest.mark.parametrize("shape", [(4,), (4, 4, 1), (4, 4, 2), (4, 4, 5), (1, 4, 4, 3)])
def test_pixels_of_no_picture(shape: tuple[int, ...]) -> None:
    with pytest.raises(PictureError, match=r"or \(height, width, 3 or 4\), got uint8 of shape"):
        picture_of(np.zeros(shape, np.uint8))


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
    cut.write_bytes(b'{"id": "caf\xe9", "prompt": "a"}')
    with pytest.raises(InputError, match="line 1 of rows.jsonl is not JSON: 'utf-8' codec"):
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
