"""A Ray that cannot start or be reached is said in one line. Without Ray: a stand-in raises."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tokenprune.cli import main
from tokenprune_adapters import pocket

SLOW = "The current node timed out during startup. This could happen because some of the raylet"


def broken_ray(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def init(*args: object, **options: object) -> None:
        raise error

    ray: Any = ModuleType("ray")
    data: Any = ModuleType("ray.data")
    data.DataContext = SimpleNamespace(get_current=SimpleNamespace)
    ray.init, ray.data, ray.is_initialized = init, data, lambda: False
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", data)


@pytest.mark.parametrize(
    ("address", "error", "words"),
    [
        # Ray 2.60, where a new cluster is not up after 30 seconds: an `Exception`, nothing closer.
        ("local", Exception(SLOW), f"cannot start Ray on this machine: {SLOW}"),
        ("local", Exception(SLOW), "; try again, or take --workers without --ray"),
        ("local", Exception("\nlast words\nof a log"), "on this machine: last words; try again"),
        ("local", Exception(), "cannot start Ray on this machine: Exception; try again"),
        ("auto", ConnectionError("no cluster"), "cannot reach Ray at 'auto': no cluster\n"),
        ("10.0.0.1:6379", TimeoutError("late"), "cannot reach Ray at '10.0.0.1:6379': late\n"),
    ],
)
def test_one_line(
    address: str,
    error: Exception,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken_ray(monkeypatch, error)
    folder, output = tmp_path / "pictures", tmp_path / "out.parquet"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    typed = {"model": pocket.CHECKPOINT, "input": folder, "output": output, "prompt": "what ?"}
    typed |= {"ray": address, "workers": 2}
    with pytest.raises(SystemExit) as stop:
        main(["batch", *(word for n, value in typed.items() for word in (f"--{n}", str(value)))])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("tokenprune: ")
    assert said.count("\n") == 1
    assert not output.exists()
