"""`tokenprune tune`: the cheapest spec that answers as the unpruned model does."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..bench.tuning import CANDIDATES, CONFIRMED, KEEPS, Cost, Trial, Tuned, tune
from .bench import budgets, longest, model_named, samples_of
from .console import console, milliseconds, table
from .errors import CommandError


def run_tune(
    model: str,
    data: Path | None,
    floor: float,
    confidence: float,
    prune: tuple[str, ...],
    keep: str | None,
    cost: str,
    batch: int,
    max_new_tokens: int | None,
    device: str,
    dtype: str,
) -> Tuned:
    """Search, confirm, and print the spec on the last line."""
    if cost not in get_args(Cost):
        raise CommandError(f"--cost must be time or tokens, got {cost!r}")
    samples = samples_of(model, data, full=True, count=None)
    loaded = model_named(model, device, dtype)
    out = console()
    columns = (SpinnerColumn(), TextColumn("{task.completed} replies"), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True) as bars:
        bar = bars.add_task("asking")
        tuned = tune(
            loaded.model,
            loaded.processor,
            samples,
            floor=floor,
            confidence=confidence,
            specs=prune or CANDIDATES,
            keeps=KEEPS if keep is None else budgets(keep),
            cost="time" if cost == "time" else "tokens",
            batch=batch,
            max_new_tokens=longest(model, max_new_tokens),
            progress=lambda count: bars.advance(bar, count),
        )
    shown = table("search", "agreement", "visual tokens, mean over layers", "a prompt")
    for trial in tuned.searched:
        shown.add_row(trial.spec, *_cells(trial))
    out.print(shown, "")
    shown = table("confirmation", "agreement", "bound", "visual tokens", "a prompt")
    shown.add_row("vanilla", "", "", "", milliseconds(tuned.vanilla.milliseconds / 1000))
    for trial in tuned.confirmed:
        agreement, *rest = _cells(trial)
        shown.add_row(trial.spec, agreement, f"{trial.bound:.4f}", *rest)
    out.print(shown, "")
    for spec, reason in tuned.skipped.items():
        out.print(f"not tried: {spec}: {reason}", markup=False, soft_wrap=True)
    out.print(
        "agreement: pictures on all of whose prompts the reply is the unpruned model's; bound: "
        f"exact binomial, one-sided, {tuned.confidence:.3g} for up to {CONFIRMED} confirmations "
        f"together, on {tuned.vanilla.pictures} pictures that the search has not seen",
        style="dim",
    )
    reached = any(
        trial.bound is not None and trial.bound >= tuned.floor for trial in tuned.confirmed
    )
    if tuned.best is None and reached:
        out.print(
            f"what reaches {tuned.floor:.3g} is no faster than the unpruned model here: leave the "
            "model as it is, or ask for fewer tokens with --cost tokens",
            soft_wrap=True,
        )
    elif tuned.best is None:
        out.print(f"nothing reaches {tuned.floor:.3g}: leave the model as it is, or lower --floor")
    else:
        out.print(tuned.best.spec, markup=False, soft_wrap=True)
    return tuned


def _cells(trial: Trial) -> tuple[str, str, str]:
    return (
        f"{trial.agreeing} of {trial.pictures}",
        f"{trial.tokens:.1f}",
        milliseconds(trial.milliseconds / 1000),
    )
