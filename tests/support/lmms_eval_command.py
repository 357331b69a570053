"""Runs the command `lmms-eval` as a user would, offline, and reads what it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .markdown import ROOT


@dataclass
class Ran:
    """One run of the command: its exit code, its words, and its results where it wrote some."""

    code: int
    words: str
    score: float | None = None
    answers: list[str] = field(default_factory=list)
    throughput: dict[str, float] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


@dataclass
class Harness:
    """Data and tasks in a folder, and the command to run them with.

    Attributes:
        place: where `tasks`, data, results and caches are.
        path: folders that Python searches beside its own.
    """

    place: Path
    path: tuple[Path, ...] = ()

    def run(self, task: str, model: str, *options: str, **arguments: object) -> Ran:
        """``lmms-eval --model MODEL --model_args ARGUMENTS --tasks TASK OPTIONS``, on the CPU."""
        number = len(list(self.place.glob("out-*")))
        out = self.place / f"out-{number}"
        out.mkdir()
        command = [
            str(Path(sys.executable).with_name("lmms-eval")),
            *("--model", model, "--tasks", task, "--device", "cpu", "--log_samples"),
            *("--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())),
            *("--include_path", str(self.place / "tasks"), "--output_path", str(out), *options),
        ]
        given = os.environ.get("PYTHONPATH")
        settings = {
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": str(self.place / "hf"),
            "PYTHONPATH": os.pathsep.join(filter(None, [*map(str, self.path), given])),
            # lmms-eval takes the commit of the repository around it for its version.
            "GIT_CEILING_DIRECTORIES": str(ROOT),
        }
        ran = subprocess.run(
            command,
            cwd=out,  # so that arguments with a relative path are the same in every run
            env=os.environ | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1200,
        )
        found = Ran(ran.returncode, ran.stdout)
        for path in out.rglob("*_results.json"):
            results = json.loads(path.read_text())
            found.score = results["results"][task]["exact_match,none"]
            found.throughput = results.get("throughput", {})
        for path in out.rglob("*_samples_*.jsonl"):
            rows = sorted(map(json.loads, path.read_text().splitlines()), key=lambda r: r["doc_id"])
            found.answers = [row["filtered_resps"].strip() for row in rows]
        if (out / "report.json").exists():
            found.report = json.loads((out / "report.json").read_text())
        return found
