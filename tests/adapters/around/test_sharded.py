"""A model between two processes: FSDP's shards and transformers' tensor-parallel plan, by gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support import sharded_llava
from support.llava import tiny_llava


def test_shards_are_served_and_split_heads_refused_where_they_are_read(tmp_path: Path) -> None:
    tiny_llava().save_pretrained(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    ran = subprocess.run(
        [*command, sharded_llava.__file__, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**clean, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    lines = sorted(line for line in ran.stdout.splitlines() if line.startswith(("fsdp ", "tp ")))
    assert len(lines) == 2 * 2 * len(sharded_llava.SPECS)
    for line in lines:
        kind, name, said = line.split(" ", 2)
        if (kind, name) == ("tp", "text"):
            assert "computes 2 of 4 in each process (tensor parallel)" in said
        else:
            assert said == "equal", line
