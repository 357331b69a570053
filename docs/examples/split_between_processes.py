"""Captions of a folder's pictures by all processes of one machine, each with a model of its own.

Start it by `torchrun --nproc-per-node 2 split_between_processes.py PICTURES OUTPUT --model MODEL`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

# Loaded before the process group exists, and that is why it stands here: the defaults of its
# functions are the group of that moment, and would keep it, with its threads, alive to the end.
import torch.distributed.nn  # noqa: F401
from accelerate import PartialState
from accelerate.utils import gather_object

from tokenprune.batch import Answerer

BATCH = 8


def main() -> None:
    """Answer this process's share; the first process writes what all of them have."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prune", default="vtc-cls(keep=128)")
    parser.add_argument("--prompt", default="Describe the picture.")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--cpu", action="store_true", help="gloo, for a machine without GPUs")
    typed = parser.parse_args()

    state = PartialState(cpu=typed.cpu)
    answerer = Answerer(
        typed.model,
        typed.prune,
        prompt=typed.prompt,
        max_new_tokens=typed.max_new_tokens,
        device=str(state.device),
        root=str(typed.pictures),
    )
    names = sorted(path.name for path in typed.pictures.iterdir())
    rows: list[dict[str, object]] = []
    with state.split_between_processes(names) as mine:
        for start in range(0, len(mine), BATCH):
            columns = answerer({"image": mine[start : start + BATCH]})
            for values in zip(*columns.values(), strict=True):
                row = dict(zip(columns, values, strict=True))
                rows.append({"process": state.process_index, **row})
    rows = gather_object(rows)
    if state.is_main_process:
        typed.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    state.destroy_process_group()


if __name__ == "__main__":
    main()
