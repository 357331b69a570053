"""What users get wrong with `tokenprune batch` is said in one line, before anything is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from tokenprune.cli import main
from tokenprune_adapters import pocket


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["batch", "--model", str(pocket.CHECKPOINT), *map(str, words)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("tokenprune: ")
    assert error.count("\n") == 1
    return error


def test_rows_without_a_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder.parent / "out.parquet"
    error = said(capsys, "--input", folder, "--output", output)
    assert "row 'a.png' has no prompt; give one for such rows: --prompt TEXT" in error
    assert not list(folder.parent.glob("out*"))


def test_a_spec(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed = ["--input", folder, "--output", folder.parent / "o.parquet", "--prompt", "what ?"]
    assert "unknown strategy 'nope'" in said(capsys, *typed, "--prune", "nope | evict(3)")


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("out.csv", "the output is a parquet file; name it .parquet, not 'out.csv'"),
        ("pictures/out.parquet", "would be among its own input; write it outside of"),
    ],
)
def test_an_output(
    output: str, words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["--input", folder, "--output", folder.parent / output, "--prompt", "what ?"]
    assert words in said(capsys, *typed)


@pytest.mark.parametrize(
    ("package", "words"),
    [
        ("pyarrow", "needs pyarrow: pip install 'tokenprune-vlm[batch]'"),
        ("ray", "--ray needs Ray Data: pip install 'tokenprune-vlm[ray]'"),
    ],
)
def test_what_is_not_installed(
    package: str,
    words: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    typed = ["--input", folder, "--output", folder.parent / "o.parquet", "--prompt", "what ?"]
    assert words in said(capsys, *typed, "--ray", "local")


def test_when_no_row_is_good(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.png").write_text("no picture")
    output = folder.parent / "out.parquet"
    typed = ["--input", folder, "--output", output, "--prompt", "what ?"]
    assert "no row was answered: every one has an error" in said(capsys, *typed)
    assert output.exists()
