"""`tokenprune analyze`: do scores agree with what the LLM attends to, layer by layer?"""

from __future__ import annotations

from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..analysis.curves import Consistency, Queries
from ..analysis.layers import consistency
from ..analysis.noted_scores import scorer_of
from ..analysis.plots import plot
from ..bench.scoring import Mean
from .bench import budgets, longest, model_named, samples_of, together
from .console import console, table


def run_analyze(
    model: str,
    data: Path | None,
    prune: tuple[str, ...],
    keep: str,
    questions: int | None,
    out: Path,
    batch: int | None,
    max_new_tokens: int | None,
    device: str,
    dtype: str,
) -> Consistency:
    """Ask, compare, show a table, and write `analyze.json` and plots."""
    for spec in prune:
        scorer_of(spec)  # what cannot work is said before gigabytes are loaded
    keeps = budgets(keep)
    samples = samples_of(model, data, full=False, count=questions)
    loaded = model_named(model, device, dtype)
    screen = console()
    columns = (TextColumn("asking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True) as bars:
        bar = bars.add_task("asking", total=len(samples))
        result = consistency(
            loaded.model,
            loaded.processor,
            samples,
            prune or None,
            keeps,
            name=model,
            data=str(data or "Pocket-VQA"),
            batch=together(model, batch),
            max_new_tokens=longest(model, max_new_tokens),
            progress=lambda done: bars.advance(bar, done),
        )
    result.write(out)
    plots = plot(result, out)
    for queries, heading in HEADINGS.items():
        screen.print(_table(result, queries, heading), "")
    screen.print(_explained(result), style="dim")
    names = ", ".join(["analyze.json", *(path.name for path in plots)])
    screen.print(f"wrote {names} in {out}", markup=False, soft_wrap=True)
    return result


HEADINGS: dict[Queries, str] = {
    "output": "output tokens ask",
    "last": "the prompt's last token asks",
}


def _table(result: Consistency, queries: Queries, heading: str) -> Table:
    """Scorers down; overlaps and correlation, mean over layers, across."""
    overlaps = [
        f"overlap at {keep if isinstance(keep, int) else f'{keep:.3g}'}" for keep in result.keeps
    ]
    shown = table(heading, *(f"{name}, %" for name in overlaps), "rank correlation", "best layer")
    for scorer in result.scorers:
        cells = [
            _percent(result.curve(scorer, "overlap", queries, keep).mean) for keep in result.keeps
        ]
        related = result.curve(scorer, "correlation", queries)
        cells.append(f"{related.mean.value:+.3f} ± {related.mean.error:.3f}")
        layers = [each.value for each in related.layers]
        best = max(range(len(layers)), key=lambda n: layers[n])
        cells.append(f"{layers[best]:+.2f} in {best + 1}")
        shown.add_row(scorer, *cells, style="dim" if scorer == "random" else None)
    return shown


def _percent(mean: Mean) -> str:
    return f"{100 * mean.value:.1f} ± {100 * mean.error:.1f}"


def _explained(result: Consistency) -> str:
    return (
        f"How far scores agree with the attention of the LLM, mean over layers ± standard error, "
        f"clustered by picture; {result.data['questions']} questions about "
        f"{result.data['pictures']} pictures. Overlap: tokens that both would keep; rank "
        "correlation: Spearman's; best layer: its highest. Output tokens are those of the answer "
        f"({result.answer:.3g} on average), as in VTC-CLS, equation 4; from the prompt's last "
        "token the first of them is generated."
    )
