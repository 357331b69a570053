"""`tokenprune run`: one question about one picture, with and without compression."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from ..loading import load
from ..pictures import read_picture
from ..report import Report
from ..spec import parse_schedule, spec_of
from .answer import Answer, answer
from .console import console, milliseconds, size, table
from .drawing import picture_file, write_picture
from .errors import CommandError
from .seen import Seen
from .timing import Timing, explained, measure

SIDE = 384
"""Pixels that the shorter side of an overlay has at least."""


def run(
    model: str,
    image: Path,
    prompt: str,
    prune: str,
    compare: bool,
    overlay: Path | None,
    max_new_tokens: int,
    runs: int,
    device: str,
    dtype: str,
) -> None:
    """Answer, compare, draw."""
    # What cannot work is cheap to find out before gigabytes are loaded.
    stages = parse_schedule(prune)
    if overlay is not None:
        overlay = picture_file(overlay, "overlay.png")
        if len(stages) > 1:
            raise CommandError(f"an overlay shows one stage, the spec has {len(stages)}")
    spec = "; ".join(map(spec_of, stages))
    picture = read_picture(image)
    loaded = load(model, device, dtype)
    inputs = loaded.inputs(picture, loaded.text(prompt))

    specs: list[str | None] = [None, spec] if compare else [spec]
    answers = [answer(loaded, inputs, each, max_new_tokens) for each in specs]
    timings = measure(loaded.model, inputs, specs, runs) if runs else None

    screen = console()
    screen.print(f"{type(loaded.model).__name__}  {model}", markup=False, soft_wrap=True)
    screen.print(f"compressed by  {spec}\n", markup=False, soft_wrap=True)
    screen.print(_table(answers, timings), "")
    if timings:
        screen.print(explained(runs), style="dim")
    if overlay is not None:
        reduction = answers[-1].reduction
        assert reduction is not None
        seen = Seen.of(loaded, inputs)
        write_picture(seen.reduced(reduction, seen.scale(SIDE)), overlay)
        screen.print(f"overlay        {overlay}", markup=False, soft_wrap=True)


def _table(answers: list[Answer], timings: list[Timing] | None) -> Table:
    """One column for each answer, vanilla first where it was asked for."""
    report = answers[-1].report
    assert report is not None
    shown = table("", *(["vanilla"] if len(answers) > 1 else []), "compressed")
    shown.add_row("answer", *(Text(each.text) for each in answers))  # brackets are no markup
    shown.add_row("visual tokens", *_pair(answers, str(before(report)), str(after(report))))
    shown.add_row("KV cache", *_pair(answers, *kv_cache(report)))
    if timings:
        shown.add_row("time to first token", *(milliseconds(t.first) for t in timings))
        shown.add_row("each later token", *(milliseconds(t.each) for t in timings))
        selector = milliseconds(report.selector_seconds / max(report.calls, 1))
        shown.add_row("selector, first call", *_pair(answers, "-", selector))
    return shown


def _pair(answers: list[Answer], vanilla: str, compressed: str) -> list[str]:
    return [vanilla, compressed][-len(answers) :]


def before(report: Report) -> int:
    """Visual tokens of the prompt."""
    return sum(image.before for image in report.images)


def after(report: Report) -> int:
    """Visual tokens that were kept of them."""
    return sum(image.after for image in report.images)


def kv_cache(report: Report) -> tuple[str, str]:
    """KV bytes after the prefill, vanilla and compressed."""
    return size(report.kv_bytes_vanilla), size(report.kv_bytes)
