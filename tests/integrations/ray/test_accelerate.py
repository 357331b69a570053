"""accelerate on one machine: the documented script under torchrun, in two gloo processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from support.batch import SPEC
from support.markdown import ROOT
from tokenprune.batch import Answerer
from tokenprune_adapters import pocket

COUNT = 17  # does not divide

# Runs in every process. A thread of gloo that outlives the interpreter aborts it now and then.
LEFT = """
import atexit, os, pathlib, sys

def tell():
    tasks = pathlib.Path("/proc/self/task").iterdir()
    names = [(task / "comm").read_text().strip() for task in tasks]
    pathlib.Path(os.environ["LEFT"], str(os.getpid())).write_text(" ".join(names))

if "RANK" in os.environ:
    atexit.register(tell)
"""


def test_split_between_processes(tmp_path: Path) -> None:
    folder, output = tmp_path / "pictures", tmp_path / "answers.jsonl"
    folder.mkdir()
    for number in range(COUNT):
        pocket.draw(number).picture.save(folder / f"{number:02}.png")
    (folder / "05.png").write_text("no picture")
    names: list[object] = [f"{number:02}.png" for number in range(COUNT)]
    answerer = Answerer(str(pocket.CHECKPOINT), SPEC, max_new_tokens=1, root=str(folder))
    for question in pocket.questions(pocket.draw(0)):
        asked = {"prompt": [question.text]}
        alone = [answerer({"image": [name], **asked})["answer"][0] for name in names]
        if len(set(alone)) > 3:  # otherwise anything would do
            break
    else:
        raise AssertionError("no question has different answers")

    script = ROOT / "docs" / "examples" / "split_between_processes.py"
    typed = ["--model", pocket.CHECKPOINT, "--prune", SPEC, "--prompt", question.text]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*run, script, folder, output, *typed, "--max-new-tokens", "1", "--cpu"]
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(LEFT)
    (tmp_path / "left").mkdir()
    path = filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")])
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path),
        "LEFT": str(tmp_path / "left"),
    }
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr

    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["process"] for row in rows] == [0] * 9 + [1] * 8  # both did their share
    assert [row["image"] for row in rows] == names
    assert [row["answer"] for row in rows] == alone
    assert [bool(row["error"]) for row in rows] == [number == 5 for number in range(COUNT)]

    left = [file.read_text() for file in (tmp_path / "left").iterdir()]
    assert len(left) == 2
    assert not [names for names in left if "gloo" in names]
