"""Training of the pocket model: `python -m train_pocket.train --out DIR`.

Everything follows from the seed. A run that was killed continues when it is started again with
the same folder. It needs the extras `hf` and `cli`, no data set and no graphics card; one core
takes about an hour.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import LlavaForConditionalGeneration

from tokenprune.bench import Mean, Row, bench, pocket

from . import language, tower
from .card import card
from .loop import Stage, train
from .model import build, build_processor, save


@dataclass(frozen=True)
class Recipe:
    """Recipe: how much of everything.

    Attributes:
        tower: stage 1.
        language: stage 2.
        questions: how many of Pocket-VQA to ask in the end; None for all.
    """

    tower: Stage
    language: Stage
    questions: int | None


FULL = Recipe(
    Stage("tower", 3000, 64, 1.5e-3), Stage("language", 4800, 16, 1.5e-3, restart=3600), None
)
QUICK = Recipe(Stage("tower", 4, 4, 1.5e-3), Stage("language", 4, 2, 1.5e-3), 20)


def run(out: Path, seed: int, recipe: Recipe, every: float = 60.0) -> None:
    """Train, evaluate, and write `out/checkpoint`; progress is kept in `out/state`.

    Args:
        out: a folder, new or of a run that was interrupted.
        seed: seed of the weights and of all pictures.
        recipe: how much to train.
        every: seconds between two savings of the progress.
    """
    state, checkpoint = out / "state", out / "checkpoint"
    state.mkdir(parents=True, exist_ok=True)
    model = build(seed)

    seer = tower.TowerLessons(model)
    first = train(recipe.tower, seer, tower.lessons(seer, recipe.tower, seed), state, every)
    reader = language.LanguageLessons(model)
    lessons = language.lessons(reader, recipe.language, seed)
    second = train(recipe.language, reader, lessons, state, every)
    save(model, checkpoint)

    # What is shipped is what is judged: the weights as they were rounded on disk.
    shipped = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    samples = pocket(full=True)[: recipe.questions]
    judged = bench(shipped, build_processor(), samples, [], [], batch=50, max_new_tokens=1)
    results = {
        "training": {
            "seed": seed,
            "tower": asdict(recipe.tower),
            "language": asdict(recipe.language),
            "cpu_minutes": round((first.seconds + second.seconds) / 60, 1),
            "parameters": shipped.num_parameters(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "curve": {"tower": first.curve, "language": second.curve},
        "test": judged.data,
        "scores": {row.label: _scores(row) for row in judged.rows},
    }
    (checkpoint / "results.json").write_text(json.dumps(results) + "\n")
    (checkpoint / "README.md").write_text(card(results))


def _scores(row: Row) -> dict[str, dict[str, float]]:
    """Accuracy of each type, and the mean over types under "all"."""
    count = sum(one.questions for one in row.types.values())
    scores = {**row.types, "all": Mean(row.accuracy, row.error, count)}
    return {
        name: {"accuracy": one.value, "error": one.error, "questions": one.questions}
        for name, one in scores.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="Train the pocket model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for state and checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="0 is what is shipped")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as fast as two for a model so small, and its sums have one order
    run(options.out, options.seed, QUICK if options.quick else FULL)


if __name__ == "__main__":
    main()
