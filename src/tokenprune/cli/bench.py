"""`tokenprune bench`: accuracy and cost at many budgets, floors beside every method."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..bench import Bench, Row, Sample, bench, pocket, read
from ..bench.entrants import enter
from ..bench.plots import plot
from ..loading import Loaded, load
from ..shipped_adapters import pocket_model
from .console import console, milliseconds, size, table
from .errors import CommandError

POCKET = "pocket"
DEFAULT = ("vtc-cls", "tome")
KEEPS = "1.0,0.5,0.25,0.125,0.06"


def run_bench(
    model: str,
    data: Path | None,
    prune: tuple[str, ...],
    keep: str,
    questions: int | None,
    full: bool,
    out: Path,
    batch: int | None,
    max_new_tokens: int | None,
    device: str,
    dtype: str,
) -> Bench:
    """Ask, show tables, and write `bench.json`, `answers.jsonl` and plots."""
    specs = prune or DEFAULT
    keeps = budgets(keep)
    enter(specs, keeps)  # what cannot work is said before gigabytes are loaded
    samples = samples_of(model, data, full, questions)
    loaded = model_named(model, device, dtype)
    screen = console()
    columns = (TextColumn("asking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True) as bars:
        bar = bars.add_task("asking", total=None)
        result = bench(
            loaded.model,
            loaded.processor,
            samples,
            specs,
            keeps,
            name=model,
            data=str(data or "Pocket-VQA"),
            batch=together(model, batch),
            max_new_tokens=longest(model, max_new_tokens),
            progress=lambda done, all_of_them: bars.update(bar, completed=done, total=all_of_them),
        )
    result.write(out)
    plots = plot(result, out)
    screen.print(_accuracy(result), "")
    screen.print(_types(result), "")
    screen.print(_costs(result), "")
    screen.print(explained(result), style="dim")
    names = ", ".join(["bench.json", "answers.jsonl", *(path.name for path in plots)])
    screen.print(f"wrote {names} in {out}", markup=False, soft_wrap=True)
    return result


def budgets(text: str) -> list[int | float]:
    """Budgets from "1.0,0.5" (fractions) or "128,64" (tokens)."""
    try:
        return [float(part) if "." in part else int(part) for part in text.split(",")]
    except ValueError:
        raise CommandError(
            f"cannot read the budgets {text!r}; write fractions as 0.5,0.25 or tokens as 128,64"
        ) from None


def samples_of(model: str, data: Path | None, full: bool, count: int | None) -> list[Sample]:
    """What to ask: the data that was named, or Pocket-VQA for the pocket model."""
    if data is not None:
        samples = read(data)
    elif model == POCKET:
        samples = pocket(full)
    else:
        raise CommandError(
            "name questions with --data: JSON lines of image, question and answers; only the "
            "pocket model brings its own"
        )
    return samples if count is None else samples[:count]


def model_named(name: str, device: str, dtype: str) -> Loaded:
    """The shipped miniature model, or a checkpoint."""
    if name != POCKET:
        return load(name, device, dtype)
    return load(str(pocket_model().CHECKPOINT), "cpu" if device == "auto" else device, dtype)


def longest(model: str, tokens: int | None) -> int:
    """Tokens of an answer: the pocket model answers in one."""
    return tokens or (1 if model == POCKET else 16)


def together(model: str, questions: int | None) -> int:
    """Questions in one generate: a large model may have room for no more than one."""
    return questions or (50 if model == POCKET else 1)


def explained(result: Bench) -> str:
    """What the columns mean."""
    return (
        f"{result.data['questions']} questions about {result.data['pictures']} pictures; accuracy: "
        "mean over question types ± standard error, clustered by picture; floors (random, "
        "uniform, pool) stand beside every method: ✓ beats all of them by more than two paired "
        f"standard errors, ✗ does not. Times are a question's at batch {result.batch} on "
        f"{result.device}, the processor apart."
    )


def _accuracy(result: Bench) -> Table:
    """Methods and floors down, budgets across."""
    marks = {True: " [green]✓[/]", False: " [red]✗[/]", None: ""}
    keeps = list(dict.fromkeys(row.keep for row in result.rows if row.keep < 1))
    shown = table("accuracy in %", "all tokens", *(_share(result, keep) for keep in keeps))
    for label in dict.fromkeys(row.label for row in result.rows):
        rows = {row.keep: row for row in result.rows if row.label == label}
        cells = [
            f"{_percent(rows[k].accuracy)} ± {_percent(rows[k].error)}{marks[rows[k].beats_floors]}"
            if k in rows
            else ""
            for k in (1.0, *keeps)
        ]
        method = any(row.kind == "method" for row in rows.values())
        shown.add_row(label, *cells, style=None if method or 1.0 in rows else "dim")
    return shown


def _share(result: Bench, keep: float) -> str:
    """Tokens, where all rows that were asked for as many have as many in the last layer."""
    kept = {f"{row.tokens[-1][1]:.0f}" for row in result.rows if row.keep == keep}
    return f"{kept.pop()} tokens" if len(kept) == 1 else f"{100 * keep:.3g} %"


def _types(result: Bench) -> Table:
    """Types of question across, for vanilla and for methods at their smallest budget."""
    types = list(result.rows[0].types)
    shown = table("accuracy in % by type", "kept", *map(escape, types), "F1")
    last = min((row.keep for row in result.rows if row.kind == "method"), default=1.0)
    for row in result.rows:
        if row.kind == "vanilla" or row.keep == last or row.label == "blind":
            f1 = "" if row.f1 is None else _percent(row.f1)
            cells = [f"{100 * row.types[name].value:.0f}" for name in types]
            style = None if row.kind in ("method", "vanilla") else "dim"
            shown.add_row(row.label, f"{row.tokens[-1][1]:.0f}", *cells, f1, style=style)
    return shown


def _costs(result: Bench) -> Table:
    shown = table(
        "cost", "tokens", "agrees with vanilla", "KV cache", "selector", "first token", "answer"
    )
    for row in result.rows:
        if row.kind in ("vanilla", "method", "floor"):
            shown.add_row(
                row.label,
                _layers(row),
                f"{_percent(row.agreement)} ± {_percent(row.agreement_error)} %",
                "-" if row.kv_bytes is None else size(round(row.kv_bytes)),
                milliseconds(row.selector_ms / 1000) if row.selector_ms else "-",
                milliseconds(row.first_token_ms / 1000),
                milliseconds(row.total_ms / 1000),
                style="dim" if row.kind == "floor" else None,
            )
    return shown


def _layers(row: Row) -> str:
    return ", ".join(
        f"{tokens:.0f}" if layer == 0 else f"{tokens:.0f} from layer {layer}"
        for layer, tokens in row.tokens
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
