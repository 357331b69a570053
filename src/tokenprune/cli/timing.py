"""Timing of a model, with and without compression."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch

from ..attachment import Attachment, attach

if TYPE_CHECKING:
    from transformers import BatchFeature, PreTrainedModel

STEPS = 16


@dataclass(frozen=True)
class Timing:
    """Medians over some runs, in seconds.

    Attributes:
        first: until the first token is there: vision tower, selector, projector and prefill. The
            processor is not in it.
        each: for every later token.
    """

    first: float
    each: float


def attached(model: PreTrainedModel, spec: str | None) -> AbstractContextManager[Attachment | None]:
    """`attach`, or nothing at all where `spec` is None (vanilla)."""
    return nullcontext() if spec is None else attach(model, spec)


def measure(
    model: PreTrainedModel, inputs: BatchFeature, specs: Sequence[str | None], runs: int
) -> list[Timing]:
    """Time greedy generation of `STEPS` tokens, end-of-text ignored, for every one of `specs`.

    The specs take turns, so that a busy moment of the machine hits all of them alike. The first
    round warms up and is not counted. Hooks are installed before the clock starts.

    Args:
        model: the model, not attached.
        inputs: inputs of one prompt.
        specs: what to attach; None is vanilla.
        runs: rounds that count.
    """
    samples: list[list[tuple[float, float]]] = [[] for _ in specs]
    for run in range(runs + 1):
        for spec, sample in zip(specs, samples, strict=True):
            with attached(model, spec):
                first = _seconds(model, inputs, 1)
                whole = _seconds(model, inputs, STEPS)
            if run:
                sample.append((first, (whole - first) / (STEPS - 1)))
    return [
        Timing(median(first for first, _ in sample), median(each for _, each in sample))
        for sample in samples
    ]


def _seconds(model: PreTrainedModel, inputs: BatchFeature, tokens: int) -> float:
    _wait(model.device)
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
    _wait(model.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    """Let the GPU finish, so that the clock reads its work too."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def explained(runs: int) -> str:
    """What was measured, for the foot of a table."""
    return (
        f"median of {runs} runs after a warm-up; time to first token: tower, selector, projector "
        f"and prefill, without the processor; later tokens: mean over {STEPS - 1} decode steps"
    )
