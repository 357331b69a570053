"""Train the pocket model: `python -m tokenprune_adapters.pocket.train --out DIR`.

Everything follows from the seed. A run that was killed continues when it is started again with
the same folder. It needs the extras `hf` and `cli`, no data set and no graphics card; one core
takes about forty minutes.
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

from . import language, tower
from .card import card
from .evaluate import evaluate
from .loop import Stage, train
from .model import build, build_processor, save
from .task import draw


@dataclass(frozen=True)
class Recipe:
    """How much of everything.

    Attributes:
        tower: stage 1.
        language: stage 2.
        pictures: how many held-out ones to ask about in the end.
    """

    tower: Stage
    language: Stage
    pictures: int


FULL = Recipe(Stage("tower", 2800, 64, 1.5e-3), Stage("language", 2600, 20, 1.5e-3), 500)
QUICK = Recipe(Stage("tower", 4, 4, 1.5e-3), Stage("language", 4, 2, 1.2e-3), 4)


def run(out: Path, seed: int, recipe: Recipe, every: float = 60.0) -> None:
    """Train, evaluate, and write `out/checkpoint`; progress is kept in `out/state`.

    Args:
        out: a folder, new or of a run that was interrupted.
        seed: of the weights and of all pictures.
        recipe: how much to train.
        every: seconds between two savings of the progress.
    """
    state, checkpoint = out / "state", out / "checkpoint"
    state.mkdir(parents=True, exist_ok=True)
    model = build(seed)

    seer = tower.TowerLessons(model)
    seconds = train(recipe.tower, seer, tower.lessons(seer, recipe.tower, seed), state, every)
    reader = language.LanguageLessons(model)
    lessons = language.lessons(reader, recipe.language, seed)
    seconds += train(recipe.language, reader, lessons, state, every)
    save(model, checkpoint)

    # What is shipped is what is judged: the weights as they were rounded on disk.
    shipped = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    processor, scenes = build_processor(), [draw(number) for number in range(recipe.pictures)]
    scores = {
        "sighted": evaluate(shipped, processor, scenes),
        "blind": evaluate(shipped, processor, scenes, blind=True),
    }
    results = {
        "training": {
            "seed": seed,
            "tower": asdict(recipe.tower),
            "language": asdict(recipe.language),
            "cpu_minutes": round(seconds / 60, 1),
            "parameters": shipped.num_parameters(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "test": {"split": "test", "first_seed": 0, "pictures": recipe.pictures},
        "scores": {
            name: {kind: asdict(score) for kind, score in table.items()}
            for name, table in scores.items()
        },
    }
    (checkpoint / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (checkpoint / "README.md").write_text(card(results))


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="Train the pocket model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for state and checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as fast as two for a model so small, and its sums have one order
    run(options.out, options.seed, QUICK if options.quick else FULL)


if __name__ == "__main__":
    main()
