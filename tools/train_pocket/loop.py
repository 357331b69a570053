"""Optimisation loop that survives being killed."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

Step: TypeAlias = Callable[[int], tuple[Tensor, float]]
"""From the number of a step to its loss and its accuracy; all that is random follows the number."""


@dataclass(frozen=True)
class Stage:
    """Stage of training: AdamW, linear warm-up, cosine to zero, perhaps once more.

    Attributes:
        name: names the files of the stage.
        steps: number of steps of optimisation.
        batch: pictures a step.
        rate: the highest learning rate.
        warmup: steps of warm-up.
        decay: weight decay of matrices.
        restart: the step from which the rate warms up and falls once more, to half the height;
            None for never.
    """

    name: str
    steps: int
    batch: int
    rate: float
    warmup: int = 150
    decay: float = 0.05
    restart: int | None = None

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if self.restart is None:
            return self._fallen(self.rate, step, self.steps)
        if step < self.restart:
            return self._fallen(self.rate, step, self.restart)
        return self._fallen(self.rate / 2, step - self.restart, self.steps - self.restart)

    def _fallen(self, rate: float, step: int, steps: int) -> float:
        if step < self.warmup:
            return rate * (step + 1) / self.warmup
        return rate * (1 + math.cos(math.pi * step / steps)) / 2


@dataclass(frozen=True)
class Log:
    """Log of what training took and how it went.

    Attributes:
        seconds: number of seconds of CPU time.
        curve: (step, loss, accuracy), running means, every 50 steps.
    """

    seconds: float
    curve: list[tuple[int, float, float]]


def train(stage: Stage, module: nn.Module, step: Step, folder: Path, every: float = 60.0) -> Log:
    """Train what in `module` requires gradients, in place.

    Progress is kept in `folder` every so many seconds. A call that finds it there continues, and
    because a step depends on its number alone, it ends with the weights of an undisturbed run.
    """
    weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
    matrices = [p for p in weights.values() if p.ndim > 1]
    others = [p for p in weights.values() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": stage.decay}, {"params": others, "weight_decay": 0}],
        betas=(0.9, 0.98),
    )
    file = folder / f"{stage.name}.pt"
    first, spent = 0, -time.process_time()
    mean_loss = mean_accuracy = 0.0
    curve: list[tuple[int, float, float]] = []
    if file.exists():
        state = torch.load(file, weights_only=True)
        first = state["step"]
        spent += state["seconds"]
        curve = [tuple(point) for point in state["curve"]]
        mean_loss, mean_accuracy = state["means"]
        optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for name, parameter in weights.items():
                parameter.copy_(state["weights"][name])

    def save(done: int) -> None:
        state = {
            "step": done,
            "seconds": spent + time.process_time(),
            "optimizer": optimizer.state_dict(),
            "weights": weights,
            "curve": curve,
            "means": (mean_loss, mean_accuracy),
        }
        partial = file.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, file)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  {task.fields[measures]}"),
        TimeRemainingColumn(),
    )
    module.train()
    saved = time.monotonic()
    with Progress(*columns) as progress:
        bar = progress.add_task(stage.name, total=stage.steps, completed=first, measures="")
        for number in range(first, stage.steps):
            for group in optimizer.param_groups:
                group["lr"] = stage.rate_at(number)
            loss, accuracy = step(number)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(weights.values(), 1.0)
            optimizer.step()

            fresh = max(0.02, 1 / (number + 1))
            mean_loss += fresh * (loss.item() - mean_loss)
            mean_accuracy += fresh * (accuracy - mean_accuracy)
            if (number + 1) % 50 == 0:
                curve.append((number + 1, round(mean_loss, 4), round(mean_accuracy, 4)))
            measures = f"loss {mean_loss:.3f}  accuracy {mean_accuracy:.3f}"
            progress.update(bar, advance=1, measures=measures)
            if (number + 1) % 100 == 0 and not progress.console.is_terminal:
                progress.console.print(f"{stage.name} {number + 1}/{stage.steps}  {measures}")
            if time.monotonic() - saved > every:
                save(number + 1)
                saved = time.monotonic()
    save(stage.steps)
    module.eval()
    return Log(spent + time.process_time(), curve)
