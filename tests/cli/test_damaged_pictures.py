"""Damaged pictures at the doors of the commands: one line with the file's name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from support.damage import broken_chunk, damaged, huge, written
from tokenprune.cli import main
from tokenprune_adapters import pocket

BAD = {"huge": huge(), "chunk": broken_chunk(), "empty": b"", "start": b"\x89PNG"}
BAD |= {kind.lower(): next(iter(damaged(kind, 1))) for kind in written()}


def rows(folder: Path, bad: Path) -> Path:
    """Questions about good pictures and, at the end, a bad one."""
    lines = []
    for number in range(4):
        pocket.draw(number).picture.save(folder / f"good-{number}.png")
        lines.append({"image": f"good-{number}.png", "question": "how many ?", "answer": "3"})
    lines.append({"image": bad.name, "question": "how many ?", "answer": "3"})
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


DOORS: dict[str, Callable[[Path], list[str]]] = {
    "run": lambda bad: [
        *("run", "--model", str(pocket.CHECKPOINT), "--image", str(bad), "--prompt", "what ?"),
        *("--prune", "random | evict(3)", "--runs", "0"),
    ],
    "picture": lambda bad: ["picture", "--image", str(bad), "--out", str(bad.parent / "o.png")],
    "bench": lambda bad: [
        *("bench", "--data", str(rows(bad.parent, bad)), "--out", str(bad.parent / "out")),
        *("--keep", "8", "--prune", "uniform"),
    ],
    "tune": lambda bad: [
        *("tune", "--data", str(rows(bad.parent, bad)), "--prune", "pool({keep})"),
        *("--floor", "0.1"),
    ],
}


@pytest.mark.parametrize("damage", BAD)
@pytest.mark.parametrize("door", DOORS)
def test_one_line_names_the_file(
    door: str, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / f"odd-{damage}.png"
    bad.write_bytes(BAD[damage])
    with pytest.raises(SystemExit) as stop:
        main(DOORS[door](bad))
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert said[-1].startswith("tokenprune: ")
    assert bad.name in said[-1]
    assert not [line for line in said if "Traceback" in line]


def test_batch_goes_on(tmp_path: Path, tokenprune: Callable[..., object]) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, data in BAD.items():
        (folder / f"odd-{name}.png").write_bytes(data)
    pocket.draw(0).picture.save(folder / "good.png")
    out = tmp_path / "out.parquet"
    asked = ("--input", folder, "--output", out, "--prompt", "how many ?", "--max-new-tokens", 1)
    tokenprune("batch", "--model", pocket.CHECKPOINT, *asked, "--prune", "uniform | evict(8)")
    told = parquet.read_table(out).to_pylist()
    errors = {Path(row["id"]).name: row["error"] for row in told}
    assert errors.pop("good.png") in (None, "")
    assert len(errors) == len(BAD)
    assert all(errors.values()), errors
    assert not [each for each in errors.values() if "\n" in each]
