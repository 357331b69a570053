from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tokenprune.cli.app import app
from tokenprune.errors import TokenpruneError
from tokenprune_adapters import pocket


def test_the_pocket_model_by_default(tokenprune: Callable[..., Result], tmp_path: Path) -> None:
    out = tmp_path / "made" / "here"
    done = tokenprune("analyze", "--questions", 12, "--batch", 5, "--out", out)
    assert f"wrote analyze.json, consistency.png, over_k.png in {out}" in done.output
    assert "12 questions about" in done.output
    read = json.loads((out / "analyze.json").read_text())
    names = [*(f"cls-attention(layers={k})" for k in (1, 2, 4, 5)), "cls-attention", "random"]
    assert sorted(read["scorers"]) == sorted(names)
    depth = pocket.load()[0].config.text_config.num_hidden_layers
    assert {len(curve["layers"]) for curve in read["curves"]} == {depth}
    for name in names:
        assert name in done.output
    assert sorted(path.name for path in out.iterdir()) == [
        "analyze.json",
        "consistency.png",
        "over_k.png",
    ]


def test_data_and_scorers_of_ones_own(tokenprune: Callable[..., Result], tmp_path: Path) -> None:
    """Questions without answers, by relative file names; budgets in tokens."""
    lines = []
    for seed in (3, 4):
        scene = pocket.draw(seed)
        scene.picture.save(tmp_path / f"{seed}.png")
        for question in pocket.questions(scene)[:2]:
            lines.append(json.dumps({"image": f"{seed}.png", "question": question.text}))
    data = tmp_path / "asked.jsonl"
    data.write_text("\n".join(lines))
    chosen = ["--prune", "fastv @ after-layer(2)", "--prune", "vtc-cls(keep=3)"]
    out = tmp_path / "out"
    done = tokenprune("analyze", "--data", data, *chosen, "--keep", "3", "--out", out)
    assert "4 questions about 2 pictures" in done.output
    read = json.loads((out / "analyze.json").read_text())
    assert read["scorers"] == ["fastv @ after-layer(2)", "vtc-cls(keep=3)", "random"]
    assert read["keeps"] == [3]
    fastv = next(
        curve
        for curve in read["curves"]
        if curve["scorer"].startswith("fastv")
        and (curve["measure"], curve["queries"]) == ("overlap", "last")
    )
    assert fastv["layers"][1]["value"] == 1  # it is what layer 2 of the LLM attends to
    assert not (out / "over_k.png").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prune", "tome(4)"], "does not start with a scorer"),
        (["--prune", "nope"], "unknown strategy 'nope'"),
        (["--keep", "half"], "cannot read the budgets 'half'"),
        (["--model", "somebody/model"], "name questions with --data"),
        (["--prune", "pool-attention", "--questions", "2"], "cannot supply PoolAttention"),
    ],
    ids=lambda each: each if isinstance(each, str) else each[1],
)
def test_what_cannot_be_used_is_said(words: list[str], said: str, tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["analyze", "--out", str(tmp_path / "out"), *words])
    assert isinstance(ran.exception, TokenpruneError)
    assert said in str(ran.exception)
    assert not (tmp_path / "out").exists()
