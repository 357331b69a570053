"""`tokenprune demo`: the shipped miniature model, at a few budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from rich.table import Table

from ..analysis.canvas import magnify, picture_of, times
from ..analysis.overlay import overlay
from ..analysis.sheet import side_by_side
from ..loading import Loaded, quiet
from ..plan import Plan
from ..shipped_adapters import pocket_model
from .answer import Answer, answer
from .console import console, milliseconds, size, table
from .drawing import write_picture
from .timing import Timing, explained, measure

if TYPE_CHECKING:
    from ..shipped_adapters import Question

BUDGETS = (28, 14, 7)
"""Of 64 visual tokens: the shares that 256, 128 and 64 are of LLaVA-1.5's 576."""

METHOD = "cls-attention(layers=3) | evict({keep}) @ before-llm"
CONTROL = "random | evict({keep}) @ before-llm"

SPECS: dict[str, str | None] = {
    "vanilla": None,
    **{f"keep {keep}": METHOD.format(keep=keep) for keep in BUDGETS},
    f"random {BUDGETS[-1]}": CONTROL.format(keep=BUDGETS[-1]),
}
"""What the demo attaches, by the title of its column; the control tells merit from luck."""


@dataclass(frozen=True)
class Column:
    """Column of the demo's table: all answers under one spec."""

    title: str
    answers: tuple[Answer, ...]

    def right(self, asked: Sequence[Question]) -> int:
        """How many answers are true."""
        pairs = zip(self.answers, asked, strict=True)
        return sum(given.text == question.answer for given, question in pairs)


def demo(out: Path, seed: int, runs: int) -> None:
    """Draw a picture, ask about it at every budget, and write what was kept.

    Args:
        out: folder for `picture.png` and `overlay.png`.
        seed: seed of the picture, which the model has never seen.
        runs: timed runs; 0 measures nothing.
    """
    pocket = pocket_model()
    quiet()
    loaded = Loaded(*pocket.load())
    scene = pocket.draw(seed)
    asked = pocket.questions(scene)
    inputs = [loaded.inputs(scene.picture, pocket.prompt(question)) for question in asked]

    columns = [
        Column(title, tuple(answer(loaded, each, spec, tokens=1) for each in inputs))  # one word
        for title, spec in SPECS.items()
    ]
    timings = measure(loaded.model, inputs[0], list(SPECS.values()), runs) if runs else None

    screen = console()
    parameters = loaded.model.num_parameters() / 1e6
    screen.print(
        f"{type(loaded.model).__name__}, {parameters:.2f} million parameters, trained without "
        f"compression; picture {seed}, drawn for this run",
        soft_wrap=True,
    )
    screen.print(f"keep N         {METHOD.format(keep='N')}", markup=False, soft_wrap=True)
    screen.print(f"random N       {CONTROL.format(keep='N')}\n", markup=False, soft_wrap=True)
    screen.print(_answers(columns, asked), "")
    screen.print(_costs(columns, timings), "")
    if timings:
        screen.print(explained(runs), style="dim")
        screen.print(
            "A model this small spends its time on overhead, not on tokens: take times from "
            "a large one (tokenprune run).",
            style="dim",
        )

    looks = loaded.processor.image_processor
    pixels = inputs[0]["pixel_values"][0]
    seen = picture_of(pixels, looks.image_mean, looks.image_std)
    plans = {column.title: _plan(column) for column in columns[1:]}
    write_picture(magnify(scene.picture), out / "picture.png")
    write_picture(_sheet(seen, plans, loaded.grid(pixels)), out / "overlay.png")
    screen.print(f"wrote          {out / 'picture.png'}, {out / 'overlay.png'}", soft_wrap=True)


def _plan(column: Column) -> Plan:
    reduction = column.answers[0].reduction
    assert reduction is not None
    return reduction.plan


def _sheet(seen: Image.Image, plans: dict[str, Plan], grid: tuple[int, int]) -> Image.Image:
    """The picture, then what is left of it at every budget."""
    shown = {f"all {grid[0] * grid[1]} visual tokens": magnify(seen, 256)}
    for title, plan in plans.items():
        shown[title] = overlay(seen, plan, grid, scale=times(seen, 256))
    return side_by_side(shown)


def _answers(columns: Sequence[Column], asked: Sequence[Question]) -> Table:
    shown = table("question", "truth", *(column.title for column in columns), footer=True)
    for number, question in enumerate(asked):
        given = [column.answers[number].text for column in columns]
        marks = [
            f"[green]{text}[/]" if text == question.answer else f"[red]{text} ✗[/]"
            for text in given
        ]
        shown.add_row(question.text, question.answer, *marks)
    shown.columns[0].footer = "right"
    for place, column in enumerate(columns, start=2):
        shown.columns[place].no_wrap = True
        shown.columns[place].footer = f"{column.right(asked)} of {len(asked)}"
    return shown


def _costs(columns: Sequence[Column], timings: Sequence[Timing] | None) -> Table:
    shown = table("", *(column.title for column in columns))
    pruned = [column.answers[0].report for column in columns[1:]]
    reports = [report for report in pruned if report is not None]
    shown.add_row(
        "visual tokens",
        str(reports[0].tokens_before),
        *(str(report.tokens_after) for report in reports),
    )
    shown.add_row(
        "KV cache after prefill",
        size(reports[0].kv_bytes_vanilla),
        *(size(report.kv_bytes) for report in reports),
    )
    if timings:
        shown.add_row("time to first token", *(milliseconds(t.first) for t in timings))
        shown.add_row("each later token", *(milliseconds(t.each) for t in timings))
    return shown
