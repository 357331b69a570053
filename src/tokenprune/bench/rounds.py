"""Rounds in which every entrant answers the same batches, so that times can be compared."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from ..attachment import attach
from .data import Sample
from .entrants import Entrant, Given

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

GRAY = (128, 128, 128)


@dataclass
class Record:
    """Answers of one entrant, and what they cost.

    Attributes:
        replies: one for each sample, in order.
        first, total: seconds a question, one for each batch that was timed: until the first token
            is there, and until the answer is complete. Tower, selector, projector, LLM; without the
            processor.
        selector: seconds a question, one for each batch that was timed.
        layers: visual tokens from an LLM layer on, by layer, of all pictures.
        kv_bytes, kv_bytes_vanilla: number of bytes of all prompts; 0 where the model was not
            reduced.
        pictures: how many pictures `layers` adds up; where budgets are per crop, how many crops.
        before: visual tokens of all pictures before any reduction.
        depth: layers of the LLM.
    """

    replies: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    selector: list[float] = field(default_factory=list)
    layers: dict[int, int] = field(default_factory=dict)
    kv_bytes: int = 0
    kv_bytes_vanilla: int = 0
    pictures: int = 0
    before: int = 0
    depth: int = 0

    def forget_times(self) -> None:
        """Begin to measure anew."""
        for times in (self.first, self.total, self.selector):
            times.clear()

    @property
    def first_token_ms(self) -> float:
        """Median over batches of the milliseconds a question until the first token."""
        return 1000 * median(self.first)

    @property
    def total_ms(self) -> float:
        """Median over batches of the milliseconds a question until its answer is complete."""
        return 1000 * median(self.total)

    @property
    def mean_tokens(self) -> float:
        """Visual tokens of a picture, mean over the layers of the LLM; NaN if nothing is reduced.

        This is what KV cache and, nearly, prefill are proportional to.
        """
        if not self.pictures:
            return math.nan
        starts = [*sorted(self.layers), self.depth]
        spans = itertools.pairwise(starts)
        total = sum(self.layers[start] * (stop - start) for start, stop in spans)
        return total / self.depth / len(self.replies)

    @property
    def selector_ms(self) -> float:
        """Median over batches of the milliseconds a question for scoring and reducing."""
        return 1000 * median(self.selector) if self.selector else 0.0


def ask(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    entrants: Sequence[Entrant],
    *,
    text: Callable[[str], str],
    batch: int,
    max_new_tokens: int,
    oracle: Given | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Record]:
    """Greedy answers of every entrant to every sample.

    Times of the first batch do not count, since a device's first call of what only one entrant
    needs would be that one's time. Where there is no other batch, all answer it once more in front.

    Args:
        model: a model with an adapter, not attached.
        processor: its processor.
        samples: what to ask.
        entrants: who answers.
        text: function from a question to the prompt with its placeholder.
        batch: questions in one `generate`.
        max_new_tokens: longest answer.
        oracle: the scores of oracle entrants; set to the truth of each batch.
        progress: function that is told after each batch of an entrant how many questions were
            answered.
    """
    records = [Record() for _ in entrants]
    for number, part in enumerate(_batches(samples, batch)):
        seen = [sample.picture() for sample in part]
        prompts = [text(sample.question) for sample in part]
        sighted = _inputs(model, processor, seen, prompts)
        unseen: Any = None
        if oracle is not None:
            oracle.rows[:] = [_known(sample) for sample in part]
        if number == 0 and len(samples) <= batch:
            for entrant in entrants:
                _answer(model, processor, sighted, entrant, max_new_tokens, Record())
        for entrant, record in zip(entrants, records, strict=True):
            if entrant.blind and unseen is None:
                gray = [Image.new("RGB", picture.size, GRAY) for picture in seen]
                unseen = _inputs(model, processor, gray, prompts)
            given = unseen if entrant.blind else sighted
            _answer(model, processor, given, entrant, max_new_tokens, record)
            progress(len(part))
        if number == 0 and len(samples) > batch:
            for record in records:
                record.forget_times()
    return records


def _batches(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def _known(sample: Sample) -> Tensor:
    assert sample.truth is not None
    return sample.truth


def _inputs(
    model: PreTrainedModel, processor: ProcessorMixin, pictures: list[Any], prompts: list[str]
) -> Any:
    made = processor(
        images=pictures, text=prompts, padding=True, padding_side="left", return_tensors="pt"
    )
    return made.to(model.device, model.dtype)


def _answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    inputs: Any,
    entrant: Entrant,
    max_new_tokens: int,
    record: Record,
) -> None:
    """One batch of one entrant; hooks are installed before the clock starts."""
    rows, length = inputs["input_ids"].shape
    clock = _Clock(model.device)
    with (
        attach(model, *entrant.stages) if entrant.stages else nullcontext() as attached,
        torch.inference_mode(),
    ):
        clock.start()
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            stopping_criteria=[clock],
        )
        total = clock.seconds()
    record.replies += processor.batch_decode(output[:, length:], skip_special_tokens=True)
    record.total.append(total / rows)
    record.first.append((clock.first or total) / rows)
    if attached is None:
        return
    record.depth = model.config.get_text_config().num_hidden_layers
    report = attached.report
    record.selector.append(report.selector_seconds / rows)
    record.kv_bytes += report.kv_bytes
    record.kv_bytes_vanilla += report.kv_bytes_vanilla
    record.pictures += rows  # one each, however many tiles a report has of it
    record.before += report.tokens_before
    for layer, tokens in report.layers:
        record.layers[layer] = record.layers.get(layer, 0) + tokens


class _Clock:
    """Clock that reads the time at the first token; it stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin = 0.0
        self.first: float | None = None

    def start(self) -> None:
        self._wait()
        self.begin = time.perf_counter()

    def seconds(self) -> float:
        self._wait()
        return time.perf_counter() - self.begin

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if self.first is None:
            self.first = self.seconds()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def _wait(self) -> None:
        """Let the GPU finish, so that the clock reads its work too."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
