"""Rows for batch work, what the model itself answers to them, and workers that die."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

import tokenprune
from tokenprune.batch.answerer import Answerer, Columns
from tokenprune_adapters import pocket

SPEC = "vtc-cls(keep=14)"


def write_rows(folder: Path, count: int) -> Path:
    """Pictures, and JSON lines that ask two questions of different length about each of them."""
    folder.mkdir()
    lines = []
    for number in range(count // 2):
        scene = pocket.draw(number)
        scene.picture.save(folder / f"{number}.png")
        asked = sorted(pocket.questions(scene), key=lambda question: len(question.text))
        for question in (asked[0], asked[-1]):
            image = f"{number}.png"
            lines.append({"id": f"row-{len(lines)}", "image": image, "question": question.text})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def alone(file: Path, spec: str | None = SPEC, rows: int | None = None) -> dict[str, str]:
    """Answers of the model itself to the first `rows`, by id, one prompt at a time."""
    from PIL import Image

    model, processor = pocket.load()
    answers = {}
    with nullcontext() if spec is None else tokenprune.attach(model, spec):
        for row in map(json.loads, file.read_text().splitlines()[:rows]):
            picture = Image.open(file.parent / row["image"]).convert("RGB")
            text = pocket.prompt(row["question"])
            inputs = processor(images=picture, text=text, return_tensors="pt")
            with torch.inference_mode():
                output = model.generate(**inputs, max_new_tokens=1, do_sample=False)
            new = output[0, inputs["input_ids"].shape[1] :]
            answers[row["id"]] = processor.decode(new, skip_special_tokens=True).strip()
    return answers


def columns(file: Path) -> dict[str, list[Any]]:
    """The rows of `write_rows` as columns for an `Answerer`."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    names = {"id": "id", "image": "image", "prompt": "question"}
    return {name: [row[held] for row in rows] for name, held in names.items()}


def answers_in(output: Path) -> dict[str, str]:
    """Answers by id, of a file in which every id is there once."""
    rows = pq.read_table(output).to_pylist()
    answers = {row["id"]: row["answer"] for row in rows}
    assert len(answers) == len(rows)
    return answers


class DiesOnce(Answerer):
    """Kills its process at the second batch, once in the life of its rows' folder."""

    def __call__(self, batch: Mapping[str, Iterable[object]]) -> Columns:
        answers = super().__call__(batch)
        first, killed = Path(self.root, "first"), Path(self.root, "killed")
        if first.exists() and not killed.exists():
            killed.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        first.touch()
        return answers
