"""Measure everything that the results page shows, with one model.

    python docs/results/measure.py --checkpoint pocket --out out/results/0

`page.py` makes the page of one or several such folders.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.progress import Progress

from tokenprune.bench import Entrant, Given, compete, enter, pocket
from tokenprune.cli.bench import model_named

BUDGETS = (28, 14, 7)
"""Of 64 visual tokens: the shares that 256, 128 and 64 are of 576."""

BEFORE = (
    "vtc-cls",
    "vtc-cls(layers=1)",
    "prumerge-plus",
    "prumerge",
    "visionzip",
    "vispruner",
    "divprune",
    "tome",
    "kmeans",
)
INSIDE = ("fastv", "vtc-cls-in-llm")
LAYERS = tuple(f"vtc-cls(layers={k})" for k in (2, 4, 5))
ENSEMBLES = ("vtc-cls(ensemble='max')", "vtc-cls(ensemble='min')")


def entrants(oracle: Given) -> list[Entrant]:
    """Tables 1, 3 and 6 at every budget; tables 4 and 5 at the middle one, as in the paper."""
    everything = enter((*BEFORE, *INSIDE), BUDGETS, oracle)
    variations = enter((*LAYERS, *ENSEMBLES), BUDGETS[1:2], oracle)
    return everything + [entrant for entrant in variations if entrant.kind == "method"]


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="pocket")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--few", action="store_true", help="300 questions, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded, oracle = model_named(options.checkpoint, "cpu", "float32"), Given()
    with Progress() as bars:
        bar = bars.add_task("asking", total=None)
        result = compete(
            loaded.model,
            loaded.processor,
            pocket(full=not options.few),
            entrants(oracle),
            oracle,
            name=options.checkpoint,
            data="Pocket-VQA",
            batch=50,
            max_new_tokens=1,
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
        )
    result.write(options.out)


if __name__ == "__main__":
    main()
