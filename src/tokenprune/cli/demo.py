"""`tokenprune demo`: the shipped miniature model, at a few budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from rich.box import SIMPLE_HEAVY
from rich.table import Table

from ..analysis.overlay import magnify, overlay, picture_of, side_by_side
from ..plan import Plan
from .answer import Answer, answer
from .console import console, milliseconds, size
from .loading import CommandError, Loaded, quiet
from .run import write_picture
from .timing import Timing, explained, measure

if TYPE_CHECKING:
    from tokenprune_adapters.pocket import Question

BUDGETS = (28, 14, 7)
"""Of 64 visual tokens: the shares that 256, 128 and 64 are of LLaVA-1.5's 576."""


def spec_for(keep: int | str) -> str:
    """The spec that the demo attaches for a budget."""
    return f"cls-attention(layers=3) | evict({keep}) @ before-llm"


@dataclass(frozen=True)
class Column:
    """All answers at one budget; None is vanilla."""

    keep: int | None
    answers: tuple[Answer, ...]

    @property
    def title(self) -> str:
        """What stands above it."""
        return "vanilla" if self.keep is None else f"keep {self.keep}"

    def right(self, asked: Sequence[Question]) -> int:
        """How many answers are true."""
        pairs = zip(self.answers, asked, strict=True)
        return sum(given.text == question.answer for given, question in pairs)


def demo(out: Path, seed: int, runs: int) -> None:
    """Draw a picture, ask about it at every budget, and write what was kept.

    Args:
        out: folder for `picture.png` and `overlay.png`.
        seed: of the picture, which the model has never seen.
        runs: timed runs; 0 measures nothing.
    """
    try:
        from tokenprune_adapters import pocket
        from tokenprune_adapters.pocket import prompt
    except ImportError as error:
        raise CommandError(
            f"the demo needs the extra hf: pip install 'tokenprune-vlm[hf,cli]' ({error})"
        ) from error
    quiet()
    loaded = Loaded(*pocket.load())
    scene = pocket.draw(seed)
    asked = pocket.questions(scene)
    inputs = [loaded.inputs(scene.picture, prompt(question)) for question in asked]

    columns = []
    for keep in (None, *BUDGETS):
        spec = None if keep is None else spec_for(keep)
        answers = tuple(answer(loaded, each, spec, tokens=2) for each in inputs)
        columns.append(Column(keep, answers))
    specs = [None if column.keep is None else spec_for(column.keep) for column in columns]
    timings = measure(loaded.model, inputs[0], specs, runs) if runs else None

    screen = console()
    parameters = loaded.model.num_parameters() / 1e6
    screen.print(
        f"{type(loaded.model).__name__}, {parameters:.2f} million parameters, trained without "
        f"compression; picture {seed}, drawn for this run",
        soft_wrap=True,
    )
    screen.print(f"compressed by  {spec_for('N')}\n", markup=False, soft_wrap=True)
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
    plans = {column.title: _plan(column) for column in columns if column.keep is not None}
    write_picture(magnify(scene.picture), out / "picture.png")
    write_picture(_sheet(seen, plans, loaded.grid(pixels)), out / "overlay.png")
    screen.print(f"wrote          {out / 'picture.png'}, {out / 'overlay.png'}", soft_wrap=True)


def _plan(column: Column) -> Plan:
    plan = column.answers[0].plan
    assert plan is not None
    return plan


def _sheet(seen: Image.Image, plans: dict[str, Plan], grid: tuple[int, int]) -> Image.Image:
    """The picture, then what is left of it at every budget."""
    shown = {f"all {grid[0] * grid[1]} visual tokens": magnify(seen, 256)}
    for title, plan in plans.items():
        shown[title] = magnify(overlay(seen, plan, grid), 256)
    return side_by_side(shown)


def _answers(columns: Sequence[Column], asked: Sequence[Question]) -> Table:
    titles = [column.title for column in columns]
    table = Table(
        "question",
        "truth",
        *titles,
        show_footer=True,
        box=SIMPLE_HEAVY,
        show_edge=False,
        pad_edge=False,
    )
    for number, question in enumerate(asked):
        given = [column.answers[number].text for column in columns]
        marks = [
            f"[green]{text}[/]" if text == question.answer else f"[red]{text} ✗[/]"
            for text in given
        ]
        table.add_row(question.text, question.answer, *marks)
    table.columns[0].footer = "right"
    for place, column in enumerate(columns, start=2):
        table.columns[place].no_wrap = True
        table.columns[place].footer = f"{column.right(asked)} of {len(asked)}"
    return table


def _costs(columns: Sequence[Column], timings: Sequence[Timing] | None) -> Table:
    table = Table(
        "", *(column.title for column in columns), box=SIMPLE_HEAVY, show_edge=False, pad_edge=False
    )
    pruned = [column.answers[0].report for column in columns[1:]]
    reports = [report for report in pruned if report is not None]
    table.add_row(
        "visual tokens",
        str(reports[0].tokens_before),
        *(str(report.tokens_after) for report in reports),
    )
    table.add_row(
        "KV cache after prefill",
        size(reports[0].kv_bytes_vanilla),
        *(size(report.kv_bytes) for report in reports),
    )
    if timings:
        table.add_row("time to first token", *(milliseconds(t.first) for t in timings))
        table.add_row("each later token", *(milliseconds(t.each) for t in timings))
    return table
