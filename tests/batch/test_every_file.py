"""Every file of a folder is accounted for: a row, a bad row, or passed over with a reason."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from tokenprune.batch import InputError
from tokenprune.batch.rows import read_rows
from tokenprune.bench import DataError, read
from tokenprune.cli.app import app
from tokenprune.folders import list_pictures
from tokenprune_adapters import pocket

NOT_A_PICTURE = "it does not begin as pictures of common formats do"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file of every kind that a folder may hold."""
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    scene = pocket.draw(0).picture
    scene.save(folder / "a.png")
    scene.save(folder / "below" / "without-an-ending", "PNG")
    scene.save(folder / "photo.jfif", "JPEG")
    scene.save(folder / "wrong.txt", "WEBP")
    (folder / "link.jpg").symlink_to(folder / "a.png")
    (folder / "dangling.png").symlink_to(tmp_path / "gone.png")
    (folder / "dangling").symlink_to(tmp_path / "gone")
    (folder / "broken.png").write_text("no picture")
    (folder / "readme").write_text("words")
    (folder / "empty").touch()
    (folder / ".hidden.png").touch()
    (folder / "below" / "rows.jsonl").write_text("{}")
    (folder / "BMW.txt").write_text("BMW builds cars " * 9)
    (folder / "zeros.bin").write_bytes(bytes(4096))
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "pipe")
    (tmp_path / "elsewhere").mkdir()
    (folder / "folder.png").symlink_to(tmp_path / "elsewhere")
    (folder / "loop.gif").symlink_to(folder / "loop.gif")
    return folder


ROWS = [
    "a.png",
    "below/without-an-ending",
    "broken.png",
    "dangling.png",
    "link.jpg",
    "loop.gif",
    "photo.jfif",
    "wrong.txt",
]
PASSED_OVER = {
    ".hidden.png": "its name begins with a dot",
    "BMW.txt": "cannot be opened: ",
    "below/rows.jsonl": "rows are read from files of the folder itself, not from folders below",
    "dangling": "a link to nothing",
    "empty": NOT_A_PICTURE,
    "folder.png": "a link to a folder, which is not followed",
    "pipe": "neither a file nor a link to one",
    "pipe.png": "neither a file nor a link to one",
    "readme": NOT_A_PICTURE,
    "zeros.bin": NOT_A_PICTURE,
}


def everything(folder: Path) -> set[str]:
    """Names of all that is no folder."""
    found = set()
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        found |= {Path(place, name).relative_to(folder).as_posix() for name in [*files, *links]}
    return found


def test_rows_and_what_is_passed_over_are_all_there_is(folder: Path) -> None:
    rows = read_rows(folder, "what ?")
    assert rows.table.column("image").to_pylist() == ROWS
    said = dict(rows.passed_over)
    assert list(said) == sorted(PASSED_OVER)
    assert all(said[name].startswith(why) for name, why in PASSED_OVER.items())
    assert set(ROWS) | set(said) == everything(folder)
    assert not set(ROWS) & set(said)


def test_the_command_answers_reports_or_passes_over(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    typed = ["batch", "--model", str(pocket.CHECKPOINT), "--input", str(folder)]
    typed += ["--output", str(output), "--prompt", "is there a red one ?"]
    typed += ["--max-new-tokens", "1"]
    ran = CliRunner().invoke(app, typed)
    assert ran.exit_code == 0, ran.output
    found = {row["id"]: row for row in pq.read_table(output).to_pylist()}
    bad = {name for name, row in found.items() if row["error"] is not None}
    assert set(found) == set(ROWS)
    assert bad == {"broken.png", "dangling.png", "loop.gif"}
    assert all(found[name]["answer"] for name in found.keys() - bad)
    assert "No such file" in found["dangling.png"]["error"]
    for name, why in PASSED_OVER.items():
        assert f"passed over    {name}: {why}" in ran.output
    noted = json.loads(pq.read_schema(output).metadata[b"passed_over"])
    assert {name for name, _ in noted} == set(PASSED_OVER)


def test_of_many_that_are_passed_over_ten_are_shown_and_all_noted(tmp_path: Path) -> None:
    folder, output = tmp_path / "pictures", tmp_path / "out.parquet"
    folder.mkdir()
    pocket.draw(0).picture.save(folder / "a.png")
    for number in range(14):
        (folder / f"{number:02}.txt").touch()
    typed = ["batch", "--model", str(pocket.CHECKPOINT), "--input", str(folder)]
    typed += ["--output", str(output), "--prompt", "what ?", "--max-new-tokens", "1"]
    ran = CliRunner().invoke(app, typed)
    assert ran.output.count("passed over    ") == 10
    assert "and 4 more, see 'passed_over' in the output's metadata" in ran.output
    assert len(json.loads(pq.read_schema(output).metadata[b"passed_over"])) == 14


def test_beside_files_of_rows(folder: Path) -> None:
    lines = [{"image": "./a.png", "prompt": "a"}, {"image": str(folder / "link.jpg")}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = read_rows(folder, "what ?")
    said = dict(rows.passed_over)
    assert set(said) == everything(folder) - {"a.png", "link.jpg", "rows.jsonl"}
    assert said["photo.jfif"].endswith("of the folder itself, and none names it")
    assert read_rows(folder / "rows.jsonl", "what ?").passed_over == ()


def test_cells_may_name_files_which_is_said(tmp_path: Path) -> None:
    Image.new("L", (1, 1)).save(tmp_path / "a.png")
    held = [{"bytes": None, "path": "a.png"}]
    pq.write_table(pa.table({"image": held}), tmp_path / "rows.parquet")
    ((name, why),) = read_rows(tmp_path, "what ?").passed_over
    assert name == "a.png"
    assert why == "no row names it by a text (what cells of parquet files hold is read later)"


def test_a_link_to_no_rows_is_an_error(tmp_path: Path) -> None:
    Image.new("L", (1, 1)).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(InputError, match=r"rows\.jsonl is a link to nothing; mend it, or take"):
        read_rows(tmp_path, "what ?")


def test_a_folder_without_pictures_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("words")
    with pytest.raises(InputError, match=f"no .parquet; passed over notes: {NOT_A_PICTURE}"):
        read_rows(tmp_path, "what ?")
    with pytest.raises(DataError, match=rf"nor pictures, but notes \({NOT_A_PICTURE}\)"):
        read(tmp_path)


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    Image.new("L", (1, 1)).save(tmp_path / "a.png")
    scan = os.scandir

    def refusing(path: os.PathLike[str] | str) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    listing = list_pictures(tmp_path)
    assert listing.pictures == ("a.png",)
    assert listing.passed_over == (("closed", "a folder that cannot be listed: Permission denied"),)


def test_a_bench_warns_of_what_it_passes_over(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"passed over in .*: \.hidden\.png \(its name") as caught:
        samples = read(folder)
    assert "and 5 more" in str(caught[0].message)
    assert [one.id for one in samples] == [name for name in ROWS if "/" not in name]
    listed = list_pictures(folder, deep=False)
    assert dict(listed.passed_over)["below"] == "a folder, and folders below are not looked into"
