"""`tokenprune batch`: many pictures, resumed where it was left."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..folders import PassedOver
from .console import console
from .errors import CommandError

if TYPE_CHECKING:
    from rich.console import Console

    from tokenprune.batch.workers import Engine

SHOWN = 10
COUNTED = ("tokens_before", "tokens_after")


def run(
    model: str,
    input: Path,
    output: Path,
    prune: str | None,
    prompt: str | None,
    batch_size: int,
    save_every: int,
    workers: int,
    ray: str | None,
    max_new_tokens: int,
    device: str,
    dtype: str,
) -> None:
    """Answer every row, or go on where it was left; then say what came out."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise CommandError(
            f"reading and writing rows needs pyarrow: pip install 'tokenprune-vlm[batch]' ({error})"
        ) from error
    from tokenprune.batch import Answerer
    from tokenprune.batch.rows import read_rows
    from tokenprune.batch.work import answer_all

    output = _output(input, output)
    rows = read_rows(input, prompt)
    answerer = Answerer(
        _checkpoint(model),
        prune,
        prompt,
        max_new_tokens,
        device,
        dtype,
        rows.root,
    )
    out = console()
    start = time.perf_counter()
    with _bar(out) as bar:
        task = bar.add_task("answering", total=len(rows.table), bad=0)
        answer_all(
            answerer,
            rows,
            output,
            _engine(ray, workers, batch_size, save_every),
            save_every=save_every,
            progress=lambda done, bad: bar.update(task, completed=done, bad=bad),
        )
    _tell_passed_over(rows.passed_over, out)
    _summary(output, time.perf_counter() - start, out)


def _checkpoint(model: str) -> str:
    """A folder by its full name, since workers may stand elsewhere."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model


def _output(input: Path, given: Path) -> Path:
    output = given.expanduser().resolve()
    if output.suffix != ".parquet":
        raise CommandError(f"the output is a parquet file; name it .parquet, not {output.name!r}")
    if input.is_dir() and input.resolve() in output.parents:
        raise CommandError(f"{given} would be among its own input; write it outside of {input}")
    return output


def _engine(ray: str | None, workers: int, batch_size: int, save_every: int) -> Engine:
    from tokenprune.batch.on_ray import OnRay
    from tokenprune.batch.workers import Here, Processes

    if ray is not None:
        return OnRay(ray, workers, batch_size, save_every)
    if workers > 1:
        return Processes(workers, batch_size)
    return Here(batch_size)


def _bar(out: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[bad]} bad"),
        TimeRemainingColumn(),
        console=out,
    )


def _tell_passed_over(passed_over: PassedOver, out: Console) -> None:
    """Files of the folder that belong to no row; the output's metadata has all of them."""
    for name, why in passed_over[:SHOWN]:
        shown = name.encode(errors="backslashreplace").decode()
        out.print(f"passed over    {shown}: {why}", markup=False, soft_wrap=True)
    if len(passed_over) > SHOWN:
        more = len(passed_over) - SHOWN
        out.print(f"               and {more} more, see 'passed_over' in the output's metadata")


def _summary(output: Path, seconds: float, out: Console) -> None:
    """What the output holds, bad rows by name."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    answers = pq.read_table(output, columns=["id", "error", *COUNTED])
    bad = answers.filter(pc.is_valid(answers.column("error"))).select(["id", "error"]).to_pylist()
    for row in bad[:SHOWN]:
        out.print(f"bad row        {row['id']}: {row['error']}", markup=False, soft_wrap=True)
    if len(bad) > SHOWN:
        out.print(f"               and {len(bad) - SHOWN} more, see the column error")
    before, after = (pc.sum(answers.column(name)).as_py() for name in COUNTED)
    answered = len(answers) - len(bad)
    out.print(f"answered       {answered} of {len(answers)} rows in {seconds:.0f} s")
    if before:
        out.print(f"visual tokens  {before / answered:.1f} -> {after / answered:.1f} per row")
    out.print(f"output         {output}", markup=False, soft_wrap=True)
    if not answered:
        raise CommandError("no row was answered: every one has an error, see above")
