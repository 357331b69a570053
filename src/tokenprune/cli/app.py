"""Commands of the command line and their options; what they do is in the other files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .._version import __version__
from .options import Batch, Checkpoint, Data, Device, DType, LongestAnswer, Model, Questions

app = typer.Typer(
    help="Training-free compression of visual tokens in multimodal LLMs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tokenprune {__version__}")
        raise typer.Exit


@app.callback()
def _tokenprune(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it and exit.")
    ] = False,
) -> None:
    """Training-free compression of visual tokens in multimodal LLMs."""


@app.command("list")
def list_command(
    recipes: Annotated[
        bool, typer.Option("--recipes", help="Papers, specs, and where we differ from them.")
    ] = False,
    models: Annotated[
        bool, typer.Option("--models", help="Classes: placements, signals, positions, budgets.")
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The strategies as a table for documentation.")
    ] = False,
) -> None:
    """Show every scorer, reducer, placement, recipe and adapter that is installed."""
    from .listing import show_markdown, show_models, show_offers, show_recipes

    if recipes:
        show_recipes()
    elif models:
        show_models()
    elif markdown:
        show_markdown()
    else:
        show_offers()


@app.command("run")
def run_command(
    model: Checkpoint,
    image: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="The picture to ask about.")
    ],
    prompt: Annotated[str, typer.Option(help="The question.")],
    prune: Annotated[
        str, typer.Option(help='What to do, e.g. "cls-attention | evict(128) @ before-llm".')
    ],
    compare: Annotated[
        bool, typer.Option("--compare", help="Answer without compression too.")
    ] = False,
    overlay: Annotated[
        Path | None,
        typer.Option(help="Draw discarded patches dark: folder for overlay.png, or a file."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    runs: Annotated[
        int, typer.Option(min=0, help="Timed runs after a warm-up; 0 measures nothing.")
    ] = 5,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Ask a model about a picture, with and without compression."""
    from .run import run

    run(model, image, prompt, prune, compare, overlay, max_new_tokens, runs, device, dtype)


@app.command("batch")
def batch_command(
    model: Checkpoint,
    input: Annotated[
        Path, typer.Option(exists=True, help="Pictures or shards: folder, .jsonl, .parquet.")
    ],
    output: Annotated[Path, typer.Option(help="The parquet file to write, or to go on with.")],
    prune: Annotated[
        str | None, typer.Option(help="What to do, as a spec; without it the model as it is.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="For rows that have none.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a model answers at once.")] = 8,
    save_every: Annotated[
        int, typer.Option(min=1, help="Rows in a part file; what a kill can cost.")
    ] = 256,
    workers: Annotated[
        int, typer.Option(min=1, help="Models at work: processes, or actors of Ray.")
    ] = 1,
    ray: Annotated[
        str | None, typer.Option(help='Do it on Ray: "local", "auto" or an address.')
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Ask a model about many pictures; started again, it goes on where it was left."""
    from .batch import run

    run(
        *(model, input, output, prune, prompt, batch_size, save_every, workers, ray),
        *(max_new_tokens, device, dtype),
    )


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for the picture and the overlay.")] = Path(
        "tokenprune-demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Which picture to draw.")] = 0,
    runs: Annotated[int, typer.Option(min=0, help="Timed runs after a warm-up.")] = 5,
) -> None:
    """Compress the miniature model that is shipped: nothing is downloaded."""
    from .demo import demo

    demo(out, seed, runs)


@app.command("doctor")
def doctor_command(
    model: Annotated[
        str | None,
        typer.Option(help="Compare a checkpoint of yours: pocket, folder, or a name on the hub."),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Everything as JSON, for bug reports.")
    ] = False,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Compare every supported model, compressed, with vanilla runs; exits with 1 if they differ."""
    from .doctor import run_doctor

    run_doctor(model, json, device, dtype)


@app.command("picture")
def picture_command(
    model: Model = "pocket",
    image: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="The picture; one is drawn if not given."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What to ask about it; some methods look at it, too.")
    ] = None,
    prune: Annotated[
        list[str] | None, typer.Option(help="A method to draw; can be given often.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for kept.png or scores.png, or a file: .png, .jpg, .webp.")
    ] = Path("tokenprune-picture"),
    heat: Annotated[
        bool, typer.Option("--heat", help="Scores, and [CLS] attention by layer, as heat maps.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Which picture to draw.")] = 0,
    size: Annotated[int, typer.Option(min=1, help="Least pixels a side of each panel.")] = 256,
    columns: Annotated[int, typer.Option(min=0, help="Panels in a row; 0 for what fits.")] = 0,
    max_new_tokens: LongestAnswer = None,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Draw what methods keep and merge of a picture, side by side."""
    from .picture import run_picture

    run_picture(
        *(model, image, prompt, tuple(prune or ()), out, heat, seed, size, columns),
        *(max_new_tokens, device, dtype),
    )


@app.command("bench")
def bench_command(
    model: Model = "pocket",
    data: Data = None,
    prune: Annotated[
        list[str] | None,
        typer.Option(help="A method, whose budget is varied; can be given often [vtc-cls, tome]."),
    ] = None,
    keep: Annotated[
        str, typer.Option(help="Budgets: fractions as 0.5,0.25 or tokens as 128,64.")
    ] = "1.0,0.5,0.25,0.125,0.06",
    questions: Questions = None,
    full: Annotated[
        bool, typer.Option("--full", help="All 2,089 questions of Pocket-VQA instead of 300.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for bench.json, answers.jsonl, plots.")] = Path(
        "tokenprune-bench"
    ),
    batch: Batch = None,
    max_new_tokens: LongestAnswer = None,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Measure methods at several budgets, beside honest floors and controls."""
    from .bench import run_bench

    run_bench(
        *(model, data, tuple(prune or ()), keep, questions, full, out),
        *(batch, max_new_tokens, device, dtype),
    )


@app.command("tune")
def tune_command(
    model: Model = "pocket",
    data: Data = None,
    floor: Annotated[float, typer.Option(help="Share of pictures that must agree.")] = 0.99,
    confidence: Annotated[float, typer.Option(help="Of the bound that must reach it.")] = 0.95,
    prune: Annotated[
        list[str] | None, typer.Option(help="A method to try; can be given often.")
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="Budgets to try: 0.5,0.25 (fractions) or 128,64 (tokens).")
    ] = None,
    cost: Annotated[
        str, typer.Option(help="What is cheap: time on this device, or visual tokens.")
    ] = "time",
    batch: Annotated[int, typer.Option(min=1, help="Prompts in one generate.")] = 1,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest reply that is compared [16; pocket: 1].")
    ] = None,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Find the cheapest spec that answers your prompts as the unpruned model does."""
    from .tune import run_tune

    run_tune(
        *(model, data, floor, confidence, tuple(prune or ()), keep, cost),
        *(batch, max_new_tokens, device, dtype),
    )


@app.command("analyze")
def analyze_command(
    model: Model = "pocket",
    data: Data = None,
    prune: Annotated[
        list[str] | None,
        typer.Option(help="A scorer to compare; can be given often [[CLS] ensembles, K = 1 to 5]."),
    ] = None,
    keep: Annotated[
        str, typer.Option(help="Budgets of the overlap: 0.25,0.125 (fractions) or 128,64 (tokens).")
    ] = "0.25,0.125",
    questions: Questions = None,
    out: Annotated[Path, typer.Option(help="Folder for analyze.json and plots.")] = Path(
        "tokenprune-analyze"
    ),
    batch: Batch = None,
    max_new_tokens: LongestAnswer = None,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Compare scores with what the LLM attends to, layer by layer."""
    from .analyze import run_analyze

    run_analyze(
        *(model, data, tuple(prune or ()), keep, questions, out),
        *(batch, max_new_tokens, device, dtype),
    )


@app.command("report")
def report_command(
    folder: Annotated[
        Path, typer.Argument(help="What bench, analyze or picture wrote into.", show_default=False)
    ],
) -> None:
    """Put everything in a folder on one HTML page, report.html, that needs no network."""
    from .page import run_report

    run_report(folder)
