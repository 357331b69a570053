"""Benchmarks of compression: the same questions to a model with and without, and honest floors.

    samples = pocket()
    result = bench(model, processor, samples, ["vtc-cls"], [0.5, 0.25])
    result.write(Path("out"))

`tokenprune bench` is the command.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..attachment import attach
from ..errors import ShapeError, UnsupportedError
from .data import DataError, Sample, pocket, read
from .entrants import Entrant, Given, enter
from .result import Bench, Row, answers, rows
from .rounds import ask
from .scoring import Mean
from .setting import setting

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

__all__ = [
    "Bench",
    "DataError",
    "Entrant",
    "Given",
    "Mean",
    "Row",
    "Sample",
    "bench",
    "compete",
    "enter",
    "pocket",
    "read",
]


def bench(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    specs: Sequence[str],
    keeps: Sequence[int | float],
    *,
    name: str = "",
    data: str = "",
    batch: int = 1,
    max_new_tokens: int = 16,
    text: Callable[[str], str] | None = None,
    progress: Callable[[int, int], None] = lambda done, all_of_them: None,
) -> Bench:
    """Ask vanilla, every method at every budget, and the floors and controls beside them.

    Without a method that scores, [CLS] attention is what the control inverts; it is left out where
    the model has none.

    Args:
        model: a model with an adapter, not attached; on the device to measure.
        processor: its processor.
        samples: questions with their answers.
        specs: methods, as recipes or specs with one budget, or with `{keep}` in its place.
        keeps: budgets; a float is a fraction, an int a count of tokens; 1.0 is vanilla.
        name: name of the model, for the files.
        data: name of the data, for the files.
        batch: number of questions in one `generate`.
        max_new_tokens: number of tokens of the longest answer.
        text: function from a question to a prompt; None for the processor's chat template.
        progress: function that is told how many answers of how many are in.

    Raises:
        DataError: a sample without answers.
        SpecError, UnknownNameError, BudgetError, UnsupportedError: a spec that cannot be used.
    """
    known = all(sample.truth is not None for sample in samples)
    oracle = Given() if known else None
    entrants = [
        one
        for one in enter(specs, keeps, oracle)
        if one.label.partition(" ")[0] != "inverted" or _serves(model, one)
    ]
    return compete(
        model,
        processor,
        samples,
        entrants,
        oracle,
        name=name,
        data=data,
        batch=batch,
        max_new_tokens=max_new_tokens,
        text=text,
        progress=progress,
    )


def _serves(model: PreTrainedModel, entrant: Entrant) -> bool:
    try:
        attach(model, *entrant.stages).detach()
    except (UnsupportedError, ShapeError):  # no such signal, or a tower of fewer layers
        return False
    return True


def compete(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    entrants: Sequence[Entrant],
    oracle: Given | None = None,
    *,
    name: str = "",
    data: str = "",
    batch: int = 1,
    max_new_tokens: int = 16,
    text: Callable[[str], str] | None = None,
    progress: Callable[[int, int], None] = lambda done, all_of_them: None,
) -> Bench:
    """`bench` with entrants of your own.

    `entrants` (those of `enter`, for example) begin with vanilla. `oracle` is the scorer of oracle
    entrants, which is given the truth of each batch. Everything else is as for `bench`.

    Raises:
        DataError: no samples, or one without answers.
    """
    from ..prompts import prompter

    if not samples:
        raise DataError("a bench needs at least one question")
    unanswered = next((sample for sample in samples if not sample.answers), None)
    if unanswered is not None:
        raise DataError(
            f"sample {unanswered.id!r} has no answers to compare with; `tokenprune tune` needs none"
        )
    done, everything = 0, len(samples) * len(entrants)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, everything)

    records = ask(
        model,
        processor,
        samples,
        entrants,
        text=text or prompter(processor),
        batch=batch,
        max_new_tokens=max_new_tokens,
        oracle=oracle,
        progress=advance,
    )
    return Bench(
        **setting(model, samples, name, data),
        batch=batch,
        rows=rows(samples, entrants, records),
        answers=answers(samples, entrants, records),
    )
