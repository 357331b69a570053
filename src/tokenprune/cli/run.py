"""`tokenprune run`: one question about one picture, with and without compression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rich.table import Table
from torch import Tensor

from ..analysis.overlay import magnify, overlay, overlay_crops, picture_of
from ..errors import UnsupportedError
from ..report import Report
from ..spec import parse_schedule, spec_of
from ..strategy import Reduction
from .answer import Answer, answer
from .console import console, milliseconds, size, table
from .loading import CommandError, Loaded, load, open_picture
from .timing import Timing, explained, measure


@dataclass(frozen=True)
class Request:
    """What was typed; the options of `tokenprune run`, in their order."""

    model: str
    image: Path
    prompt: str
    prune: str
    compare: bool
    overlay: Path | None
    max_new_tokens: int
    runs: int
    device: str
    dtype: str


def run(request: Request) -> None:
    """Answer, compare, draw."""
    # What cannot work is cheap to find out before gigabytes are loaded.
    stages = parse_schedule(request.prune)
    if request.overlay is not None:
        check_writable(request.overlay)
        if len(stages) > 1:
            raise CommandError(f"an overlay shows one stage, the spec has {len(stages)}")
    spec = "; ".join(map(spec_of, stages))
    picture = open_picture(request.image)
    loaded = load(request.model, request.device, request.dtype)
    inputs = loaded.inputs(picture, loaded.text(request.prompt))

    specs: list[str | None] = [None, spec] if request.compare else [spec]
    answers = [answer(loaded, inputs, each, request.max_new_tokens) for each in specs]
    timings = measure(loaded.model, inputs, specs, request.runs) if request.runs else None

    out = console()
    out.print(f"{type(loaded.model).__name__}  {request.model}", markup=False, soft_wrap=True)
    out.print(f"compressed by  {spec}\n", markup=False, soft_wrap=True)
    out.print(_table(answers, timings), "")
    if timings:
        out.print(explained(request.runs), style="dim")
    if request.overlay is not None:
        reduction = answers[-1].reduction
        assert reduction is not None
        write_picture(draw_overlay(loaded, inputs, reduction), request.overlay)
        out.print(f"overlay        {request.overlay}", markup=False, soft_wrap=True)


def _table(answers: list[Answer], timings: list[Timing] | None) -> Table:
    """One column for each answer, vanilla first where it was asked for."""
    report = answers[-1].report
    assert report is not None
    shown = table("", *(["vanilla"] if len(answers) > 1 else []), "compressed")
    shown.add_row("answer", *(each.text for each in answers))
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
    if not report.kv_bytes_vanilla:  # nothing was dropped, so nothing was noted
        return "-", "unchanged"
    return size(report.kv_bytes_vanilla), size(report.kv_bytes)


def draw_overlay(loaded: Loaded, inputs: Mapping[str, Tensor], reduction: Reduction) -> Image.Image:
    """What the model saw of a picture, with discarded patches dark; tiles beside the base view.

    Args:
        loaded: whose processor made `inputs`.
        inputs: of one picture: `pixel_values` `(1, 3, height, width)`, or of several crops
            `(1, crops, 3, height, width)` with `image_sizes`.
        reduction: what became of its visual tokens.
    """
    pixels, looks = inputs["pixel_values"], loaded.processor.image_processor
    if pixels.ndim not in (4, 5) or (pixels.ndim == 5 and "image_sizes" not in inputs):
        raise UnsupportedError(
            "an overlay needs pixel_values with axes (batch 3 height width), or (batch crops 3 "
            f"height width) with image_sizes, got {tuple(pixels.shape)}"
        )
    seen = [
        picture_of(each, looks.image_mean, looks.image_std)
        for each in (pixels if pixels.ndim == 4 else pixels[0])
    ]
    grid = loaded.grid(pixels)
    if pixels.ndim == 4:
        return magnify(overlay(seen[0], reduction.plan, grid))
    tiles = loaded.tiles(inputs["image_sizes"][0])
    assert reduction.places is not None
    crops = seen[: 1 + tiles[0] * tiles[1]]
    return magnify(overlay_crops(crops, reduction.plan, reduction.places[0], grid, tiles))


def check_writable(path: Path) -> None:
    """Refuse a file name whose ending is no picture format."""
    known = Image.registered_extensions()
    if known.get(path.suffix.lower()) not in Image.SAVE:
        raise CommandError(f"cannot write a picture to {path}; name it .png, .jpg or .webp")


def write_picture(picture: Image.Image, path: Path) -> None:
    """Save `picture`; its folder is made where it does not exist."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error}") from error
