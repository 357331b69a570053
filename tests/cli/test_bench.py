"""`tokenprune bench` and `tokenprune tune`, whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import Result

from tokenprune import parse
from tokenprune.cli import main
from tokenprune.cli.bench import _share
from tokenprune_adapters import pocket

Command = Callable[..., Result]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures with a question each, as a user would bring them."""
    folder = tmp_path_factory.mktemp("mine")
    with (folder / "mine.jsonl").open("w") as lines:
        for number in range(40):
            scene = pocket.draw(number)
            scene.picture.save(folder / f"{number}.png")
            one = pocket.questions(scene)[number % 6]
            row = {"image": f"{number}.png", "question": one.text, "answer": one.answer}
            lines.write(json.dumps({**row, "type": one.type}) + "\n")
    return folder


def test_bench_on_pocket_vqa(tokenprune: Command, tmp_path: Path) -> None:
    output = tokenprune(
        *("bench", "--questions", 12, "--keep", "0.25,4", "--prune", "vtc-cls"),
        *("--out", tmp_path / "b"),
    ).output
    lines = {line.split()[0]: line for line in reversed(output.splitlines()) if line.strip()}
    assert "16 tokens" in lines["accuracy"]
    assert "4 tokens" in lines["accuracy"]
    for label in ("vanilla", "blind", "vtc-cls", "random", "uniform", "pool", "oracle", "inverted"):
        assert "±" in lines[label], label
    assert lines["vtc-cls"].count("✓") + lines["vtc-cls"].count("✗") == 2
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert names == {"bench.json", "answers.jsonl", "accuracy.png", "pareto.png"}
    written = json.loads((tmp_path / "b" / "bench.json").read_text())
    assert written["data"]["questions"] == 12
    assert written["batch"] == 50
    assert {row["spec"] for row in written["rows"] if row["label"] == "vtc-cls"} == {
        "cls-attention | evict(0.25) @ before-llm",
        "cls-attention | evict(4) @ before-llm",
    }


def test_bench_on_files_and_a_folder_of_weights(
    tokenprune: Command, questions: Path, tmp_path: Path
) -> None:
    tokenprune(
        *("bench", "--model", pocket.CHECKPOINT, "--data", questions, "--questions", 8),
        *("--keep", "0.25", "--prune", "tome", "--out", tmp_path, "--max-new-tokens", 1),
    )
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["data"] == {"name": str(questions), "questions": 8, "pictures": 8}
    assert written["batch"] == 1  # a large model may have room for no more
    assert not any(row["label"] == "oracle" for row in written["rows"])
    assert written["rows"][0]["accuracy"] > 0.5


def test_tune_prints_a_spec_that_works(tokenprune: Command, questions: Path) -> None:
    output = tokenprune(
        *("tune", "--data", questions, "--floor", 0.6, "--prune", "pool({keep})"),
        *("--keep", "0.75", "--cost", "tokens", "--batch", 20),
    ).output
    assert parse(output.splitlines()[-1].strip()) == parse("pool(0.75)")
    assert "exact binomial, one-sided, 0.95" in " ".join(output.split())


def test_a_column_names_tokens_only_where_its_rows_agree() -> None:
    """A schedule that starts with half of them ends with fewer."""
    rows = [SimpleNamespace(keep=0.5, tokens=((0, n),)) for n in (32.0, 32.0, 8.0)]
    assert _share(SimpleNamespace(rows=rows[:2]), 0.5) == "32 tokens"
    assert _share(SimpleNamespace(rows=rows), 0.5) == "50 %"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bench", "--keep", "half"), "cannot read the budgets 'half'"),
        (("bench", "--prune", "nope"), "unknown strategy 'nope'"),
        (("bench", "--keep", "1.5"), "a fraction to keep must be in (0, 1]"),
        (("bench", "--model", "some/model"), "name questions with --data"),
        (("bench", "--data", "nowhere"), "there is no file or folder nowhere"),
        (("tune", "--cost", "money"), "--cost must be time or tokens"),
        (("tune", "--floor", "1"), "the floor must be between 0 and 1"),
    ],
)
def test_mistakes_are_said_in_one_line(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
