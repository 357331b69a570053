"""`tokenprune demo`, whole."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from typer.testing import Result

from tokenprune_adapters import pocket

Command = Callable[..., Result]


def test_demo(tokenprune: Command, tmp_path: Path) -> None:
    output = tokenprune("demo", "--out", tmp_path / "new", "--seed", 3, "--runs", 1).output
    scene = pocket.draw(3)
    for question in pocket.questions(scene):
        line = next(line for line in output.splitlines() if line.startswith(question.text))
        assert line.removeprefix(question.text).split()[0] == question.answer
    header = next(line for line in output.splitlines() if line.startswith("question"))
    assert re.split(r"\s{2,}", header.strip())[2:] == [
        *("vanilla", "keep 28", "keep 14", "keep 7", "random 7")
    ]
    tokens = next(line for line in output.splitlines() if line.startswith("visual tokens"))
    assert tokens.split()[2:] == ["64", "28", "14", "7", "7"]
    for words in ("KV cache after prefill", "time to first token", "each later token"):
        assert words in output

    large = Image.open(tmp_path / "new" / "picture.png")
    assert large.size == (384, 384)
    assert large.getpixel((0, 0)) == scene.picture.getpixel((0, 0))
    assert Image.open(tmp_path / "new" / "overlay.png").width > 5 * 256


def test_the_default_picture_does_what_readme_says(tokenprune: Command, tmp_path: Path) -> None:
    output = tokenprune("demo", "--out", tmp_path, "--runs", 0).output
    total = next(line for line in output.splitlines() if line.startswith("right"))
    vanilla, keep28, keep14, keep7, random7 = map(int, re.findall(r"(\d+) of 11", total))
    assert (vanilla, keep28, keep14, keep7, random7) == (11, 11, 9, 9, 7)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert (
        "answers nine of the eleven questions about this picture, with 7 random ones seven"
        in " ".join(readme.split())
    )
    assert "time to first token" not in output
