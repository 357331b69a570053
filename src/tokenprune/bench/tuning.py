"""Search for the cheapest spec that still answers as the model does, without labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from ..errors import UnsupportedError
from ..prompts import prompter
from ..spec import parse_schedule
from .data import DataError, Sample
from .entrants import Entrant, adjustable, with_budget
from .lower_bound import lower_bound, trials_needed
from .match import plain
from .rounds import Record, ask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

Cost: TypeAlias = Literal["time", "tokens"]

CANDIDATES = (
    "vtc-cls",
    "tome",
    "visionzip",
    "pool({keep})",
    "fastv",
    "vtc-cls-in-llm",
)
"""Methods that are tried: by [CLS], by merging, by both, by the text, and the cheapest floor."""
KEEPS = (0.75, 0.5, 0.375, 0.25, 0.19, 0.125, 0.06)
CONFIRMED = 3


@dataclass(frozen=True)
class Trial:
    """Trial of one method on some pictures.

    Attributes:
        spec: what was attached.
        agreeing: pictures on all of whose prompts the reply was the unpruned model's.
        pictures: number of pictures.
        milliseconds: number of milliseconds of a prompt, median over batches.
        tokens: visual tokens of a picture, mean over LLM layers.
        bound: lower confidence bound of the share of agreeing pictures; None in the search.
    """

    spec: str
    agreeing: int
    pictures: int
    milliseconds: float
    tokens: float
    bound: float | None = None

    @property
    def agreement(self) -> float:
        """The share of pictures that agree."""
        return self.agreeing / self.pictures


@dataclass(frozen=True)
class Tuned:
    """Outcome of the search.

    Attributes:
        best: the cheapest trial whose bound reaches the floor; None where none does, or where the
            unpruned model is as cheap.
        vanilla: the unpruned model on the pictures of the confirmation.
        searched: all trials of the first half of the pictures.
        confirmed: the trials of the other half.
        floor: the share of agreeing pictures that was asked for.
        confidence: that was asked for; it holds for all confirmations together.
        skipped: why methods were not tried, by spec.
    """

    best: Trial | None
    vanilla: Trial
    searched: tuple[Trial, ...]
    confirmed: tuple[Trial, ...]
    floor: float
    confidence: float
    skipped: dict[str, str]


def tune(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    *,
    floor: float = 0.99,
    confidence: float = 0.95,
    specs: Sequence[str] = CANDIDATES,
    keeps: Sequence[int | float] = KEEPS,
    cost: Cost = "time",
    batch: int = 1,
    max_new_tokens: int = 16,
    text: Callable[[str], str] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Tuned:
    """Find the cheapest spec whose greedy replies are those of the unpruned model.

    Every second picture is for the search: each method with ever smaller budgets, until it falls
    clearly below the floor. The cheapest that did not are then tried on the other pictures, which
    the search has never seen; there, an exact binomial bound for each, at a confidence that holds
    for all of them together (Bonferroni), must reach the floor. Pictures are the independent
    trials: one agrees if the replies to all its prompts are equal.

    Args:
        model: a model with an adapter, not attached, on the device to tune for.
        processor: its processor.
        samples: prompts and pictures; answers are not looked at.
        floor: share of pictures that must agree, below 1.
        confidence: confidence of the bound.
        specs: methods to try, each with one budget that is varied.
        keeps: budgets to try.
        cost: what "cheap" means: "time" of a prompt on this device, or visual "tokens" over all
            layers, which is the same on every run.
        batch: prompts in one `generate`.
        max_new_tokens: longest reply that is compared.
        text: function from a question to a prompt; None for the processor's chat template.
        progress: function that is told how many replies came in.

    Raises:
        DataError: too few pictures to show the floor even if all agree; says how many it takes, and
            what floor they can show. A floor or a confidence that is none.
        SpecError, UnknownNameError, BudgetError: a spec that cannot be used.
    """
    if not 0 < floor < 1:
        raise DataError(f"the floor must be between 0 and 1, got {floor}; try 0.99")
    if not 0 < confidence < 1:
        raise DataError(f"the confidence must be between 0 and 1, got {confidence}; try 0.95")
    level = 1 - (1 - confidence) / CONFIRMED
    pictures = list(dict.fromkeys(sample.group for sample in samples))
    needed = trials_needed(floor, level)
    half = len(pictures) // 2
    if half < needed:
        most = math.floor(1000 * lower_bound(half, half, level)) / 1000 if half else 0.0
        raise DataError(
            f"{len(pictures)} pictures cannot show {floor:.3g} at confidence {confidence:.3g}: it "
            f"takes {2 * needed} even if all agree; give more, or a floor of at most {most:.3f}"
        )
    ladders = {spec: _falling(keeps) if adjustable(spec) else (None,) for spec in specs}
    first = set(pictures[::2])
    ahead = [sample for sample in samples if sample.group in first]
    behind = [sample for sample in samples if sample.group not in first]
    found: list[Trial] = []
    skipped: dict[str, str] = {}
    prompts = text or prompter(processor)

    def reply(part: Sequence[Sample], entrants: list[Entrant]) -> list[Record]:
        return ask(
            model,
            processor,
            part,
            entrants,
            text=prompts,
            batch=batch,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )

    vanilla = Entrant("vanilla", "vanilla", 1.0)
    (reference,) = reply(ahead, [vanilla])
    for spec, ladder in ladders.items():
        for keep in ladder:
            entrant = _entrant(spec, keep)
            try:
                (record,) = reply(ahead, [entrant])
            except UnsupportedError as error:
                skipped[spec] = str(error)
                break
            trial = _trial(entrant, record, reference, ahead)
            found.append(trial)
            if trial.agreement < floor - 2 * (floor * (1 - floor) / trial.pictures) ** 0.5:
                break
    hopeful = [trial for trial in found if trial.agreement >= floor]
    chosen = sorted(hopeful, key=lambda trial: _price(trial, cost))[:CONFIRMED]

    again = [vanilla, *(_entrant(trial.spec, None) for trial in chosen)]
    reference, *records = reply(behind, again)
    confirmed = tuple(
        _trial(entrant, record, reference, behind, level)
        for entrant, record in zip(again[1:], records, strict=True)
    )
    unpruned = _trial(vanilla, reference, reference, behind)
    passed = [t for t in confirmed if t.bound is not None and t.bound >= floor]
    if cost == "time":  # of tokens, nothing takes more
        passed = [t for t in passed if t.milliseconds < unpruned.milliseconds]
    return Tuned(
        best=min(passed, key=lambda trial: _price(trial, cost), default=None),
        vanilla=unpruned,
        searched=tuple(found),
        confirmed=confirmed,
        floor=floor,
        confidence=confidence,
        skipped=skipped,
    )


def _entrant(spec: str, keep: int | float | None) -> Entrant:
    stages = parse_schedule(spec) if keep is None else with_budget(spec, keep)
    return Entrant(spec, "method", 1.0 if keep is None else keep, stages)


def _falling(keeps: Sequence[int | float]) -> list[int | float]:
    """From gentle to harsh; fractions before counts, which cannot be compared with them."""
    fractions = sorted((keep for keep in keeps if isinstance(keep, float)), reverse=True)
    return [*fractions, *sorted((k for k in keeps if not isinstance(k, float)), reverse=True)]


def _trial(
    entrant: Entrant,
    record: Record,
    reference: Record,
    samples: Sequence[Sample],
    level: float | None = None,
) -> Trial:
    agrees = dict.fromkeys((sample.group for sample in samples), True)
    for sample, a, b in zip(samples, record.replies, reference.replies, strict=True):
        agrees[sample.group] &= plain(a) == plain(b)
    agreeing, pictures = sum(agrees.values()), len(agrees)
    return Trial(
        spec=entrant.spec or "vanilla",
        agreeing=agreeing,
        pictures=pictures,
        milliseconds=record.total_ms,
        tokens=record.mean_tokens,
        bound=None if level is None else lower_bound(agreeing, pictures, level),
    )


def _price(trial: Trial, cost: Cost) -> float:
    return trial.milliseconds if cost == "time" else trial.tokens
