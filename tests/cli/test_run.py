"""`tokenprune run` on the shipped model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import Result

import tokenprune as library
from tokenprune.cli.answer import Answer
from tokenprune.cli.console import console
from tokenprune.cli.run import _table
from tokenprune.loading import load
from tokenprune.report import ImageReport, Report
from tokenprune_adapters import pocket

Command = Callable[..., Result]
SPEC = "cls-attention(layers=3) | evict(14) @ before-llm"


def row(output: str, name: str) -> list[str]:
    """The cells of the table's row that starts with `name`."""
    line = next(line for line in output.splitlines() if line.strip().startswith(name))
    return re.split(r"\s{2,}", line.strip())[1:]


def test_compares_and_draws(
    tokenprune: Command, checkpoint: Path, picture_file: Path, wide_picture: Image.Image
) -> None:
    question = pocket.questions(pocket.draw(4))[0]
    drawn = picture_file.with_name("new") / "overlay.png"
    output = tokenprune(
        *("run", "--model", checkpoint, "--image", picture_file, "--prompt", question.text),
        *("--prune", SPEC, "--compare", "--overlay", drawn, "--runs", 2, "--max-new-tokens", 4),
    ).output

    model, processor = pocket.load()
    inputs = processor(images=wide_picture, text=pocket.prompt(question), return_tensors="pt")
    vanilla = model.generate(**inputs, max_new_tokens=4)
    with library.attach(model, SPEC) as pruned:
        compressed = model.generate(**inputs, max_new_tokens=4)
    length = inputs["input_ids"].shape[1]
    expected = [
        processor.decode(tokens[0, length:], skip_special_tokens=True).strip()
        for tokens in (vanilla, compressed)
    ]
    assert row(output, "answer") == expected
    assert row(output, "visual tokens") == ["64", "14"]
    before, after = (float(cell.removesuffix(" KiB")) for cell in row(output, "KV cache"))
    assert before == pytest.approx(pruned.report.kv_bytes_vanilla / 1024, abs=0.05)
    assert after == pytest.approx(pruned.report.kv_bytes / 1024, abs=0.05)
    for name in ("time to first token", "each later token"):
        assert all(float(cell.removesuffix(" ms")) > 0 for cell in row(output, name))
    assert "median of 2 runs after a warm-up" in output
    assert str(drawn) in output

    kept = set(pruned.last.plan.anchors[0].tolist())
    scene, overlay = pocket.draw(4).picture, Image.open(drawn)
    assert overlay.size == (384, 384)
    assert len(kept) == 14
    for number in range(64):
        left, top = number % 8 * 8, number // 8 * 8
        for x, y in ((left + 1, top + 1), (left + 6, top + 6)):  # within the lines
            old, new = scene.getpixel((x, y)), overlay.getpixel((6 * x + 5, 6 * y))
            assert (new == old) if number in kept else (sum(new) < 0.25 * sum(old) + 3)


def test_without_compare_there_is_one_answer(
    tokenprune: Command, checkpoint: Path, picture_file: Path
) -> None:
    output = tokenprune(
        *(
            "run",
            "--model",
            checkpoint,
            "--image",
            picture_file,
            "--prompt",
            "is there a red one ?",
        ),
        *("--prune", "random | evict(0.25)", "--runs", 0, "--max-new-tokens", 1),
    ).output
    assert row(output, "visual tokens") == ["16"]
    assert "vanilla" not in output
    assert "median" not in output


def test_a_budget_above_all_changes_nothing(
    tokenprune: Command, checkpoint: Path, picture_file: Path
) -> None:
    output = tokenprune(
        *("run", "--model", checkpoint, "--image", picture_file, "--prompt", "where is the star ?"),
        *("--prune", "vtc-cls(keep=128)", "--compare", "--runs", 0),
    ).output
    assert row(output, "visual tokens") == ["64", "64"]
    vanilla, compressed = row(output, "KV cache")
    assert vanilla == compressed != "-"
    vanilla, compressed = row(output, "answer")
    assert vanilla == compressed


def test_brackets_in_an_answer_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    text = "[0.1, 0.2] [/b] a [red]box[/red]"
    report = Report(images=(ImageReport(64, 14),))
    console().print(_table([Answer(text, report)], None))
    assert text in capsys.readouterr().out


def test_a_prompt_with_a_placeholder_is_taken_as_it_is(checkpoint: Path) -> None:
    loaded = load(str(checkpoint), "cpu", "auto")
    whole = "USER: <image> is there a red one ? ASSISTANT:"
    assert loaded.text(whole) == whole
    assert loaded.text("is there a red one ?").split() == whole.split()
    assert loaded.model.dtype.itemsize == 4  # halves would be emulated on a CPU


def test_a_dtype_is_obeyed(checkpoint: Path) -> None:
    assert str(load(str(checkpoint), "cpu", "bfloat16").model.dtype) == "torch.bfloat16"
