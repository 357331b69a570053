"""Answerer of one batch of rows: pictures and prompts in, answers out, bad rows reported."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..attachment import Attachment, attach
from ..errors import UnsupportedError
from ..report import ImageReport
from ..spec import parse_schedule, spec_of
from .errors import PictureError, WorkerError

if TYPE_CHECKING:
    from PIL import Image

    from ..loading import Loaded

Columns = dict[str, list[object]]


@dataclass(frozen=True)
class Answerer:
    """A model that answers batches of rows; pickles as its settings, and loads where it runs.

    Made for `ray.data.Dataset.map_batches`, which calls it with columns of pictures (`image`) and
    questions (`prompt`), and gets these columns back with four more: `answer`, `tokens_before` and
    `tokens_after` (visual tokens of the picture) and `error`. A picture that cannot be read has an
    `error` and no answer; the rest of its batch is answered. Whatever else goes wrong is raised.

    The model is loaded, and the strategy attached, at the first call.

    Attributes:
        model: folder of a checkpoint, or its name on the hub.
        prune: what to attach, as a spec; None leaves the model as it is, and counts no tokens.
        prompt: for rows without one. Prompts go through the model's chat template, but as they are
            where they hold the image placeholder.
        max_new_tokens: longest answer; decoding is greedy.
        device: device of the model; "auto" is the GPU where there is one.
        dtype: name of a torch dtype; "auto" is as stored, but float32 for halves on a CPU.
        root: folder that relative names of pictures are relative to.

    >>> Answerer("llava-hf/llava-1.5-7b-hf", "vtc-cls(keep=64)").prune
    'cls-attention | evict(64) @ before-llm'
    """

    model: str
    prune: str | None = None
    prompt: str | None = None
    max_new_tokens: int = 64
    device: str = "auto"
    dtype: str = "auto"
    root: str = ""
    _worker: _Worker = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", str(self.model))
        if self.prune is not None:  # a spec that cannot be read is found out here, not in a worker
            stages = parse_schedule(self.prune)
            object.__setattr__(self, "prune", "; ".join(map(spec_of, stages)))
        object.__setattr__(self, "_worker", _Worker())

    @property
    def settings(self) -> dict[str, str | int | None]:
        """The arguments that make another one like this."""
        names = ("model", "prune", "prompt", "max_new_tokens", "device", "dtype", "root")
        return {name: getattr(self, name) for name in names}

    def __reduce__(self) -> tuple[type[Answerer], tuple[str | int | None, ...]]:
        return type(self), tuple(self.settings.values())

    def __call__(self, batch: Mapping[str, Iterable[object]]) -> Columns:
        """Answer a batch.

        Args:
            batch: columns of equal length, lists or arrays: `image` (see `picture_of`), perhaps
                `prompt`, and any others.

        Returns:
            The columns of `batch`, pictures themselves left out (their names stay), and `answer`,
            `tokens_before`, `tokens_after` and `error`, None where there is none.
        """
        columns = {name: list(column) for name, column in batch.items()}
        if "image" not in columns:
            raise WorkerError(f"rows need a column 'image', got {', '.join(columns) or 'none'}")
        images = columns["image"]
        prompts = columns.get("prompt", [None] * len(images))
        with self._worker.lock:
            model = self._worker.ready(self)
            rows = _answered(model, self, images, prompts)
        if not all(isinstance(image, str) for image in images):
            del columns["image"]
        columns["answer"] = [row.answer for row in rows]
        columns["tokens_before"] = [row.before for row in rows]
        columns["tokens_after"] = [row.after for row in rows]
        columns["error"] = [row.error for row in rows]
        return columns


@dataclass
class _Worker:
    """State that belongs to one process and is never pickled."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    model: _Model | None = None

    def ready(self, settings: Answerer) -> _Model:
        if self.model is None:
            self.model = _load(settings)
        return self.model


@dataclass(frozen=True)
class _Model:
    loaded: Loaded
    pruned: Attachment | None


@dataclass(frozen=True)
class _Case:
    """A row that the model can be asked about."""

    row: int
    picture: Image.Image
    text: str


@dataclass
class _Row:
    answer: str | None = None
    before: int | None = None
    after: int | None = None
    error: str | None = None


def _load(settings: Answerer) -> _Model:
    from ..loading import load

    loaded = load(settings.model, settings.device, settings.dtype)
    tokenizer = loaded.processor.tokenizer
    tokenizer.padding_side = "left"  # answers start where prompts end
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    pruned = None if settings.prune is None else attach(loaded.model, settings.prune)
    return _Model(loaded, pruned)


def _answered(
    model: _Model, settings: Answerer, images: Sequence[object], prompts: Sequence[object]
) -> list[_Row]:
    rows = [_Row() for _ in images]
    cases = []
    for number, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        try:
            cases.append(_case(model.loaded, settings, number, image, prompt))
        except PictureError as error:
            rows[number].error = str(error)
    for group in _prepared(model.loaded, cases, rows):
        _generate(model, settings.max_new_tokens, *group, rows)
    return rows


def _case(loaded: Loaded, settings: Answerer, row: int, image: object, prompt: object) -> _Case:
    from .pictures import picture_of

    question = settings.prompt if prompt is None else str(prompt)
    if question is None:
        raise PictureError("the row has no prompt")
    text, placeholder = loaded.text(question), loaded.processor.image_token
    if text.count(placeholder) != 1:
        raise PictureError(
            f"a prompt must have one {placeholder} for its picture, got {text.count(placeholder)}"
        )
    return _Case(row, picture_of(image, settings.root), text)


def _prepared(
    loaded: Loaded, cases: list[_Case], rows: list[_Row]
) -> list[tuple[list[_Case], Mapping[str, torch.Tensor]]]:
    """Inputs of all cases together; of each by itself where a picture among them upsets them."""
    if not cases:
        return []
    try:
        made = loaded.processor(
            images=[case.picture for case in cases],
            text=[case.text for case in cases],
            padding=True,
            return_tensors="pt",
        )
    except Exception as error:  # processors raise whatever they like on odd pictures
        if len(cases) == 1:
            rows[cases[0].row].error = f"the processor refused the row: {error}"
            return []
        return [group for case in cases for group in _prepared(loaded, [case], rows)]
    return [(cases, made.to(loaded.model.device, loaded.model.dtype))]


def _generate(
    model: _Model,
    tokens: int,
    cases: list[_Case],
    inputs: Mapping[str, torch.Tensor],
    rows: list[_Row],
) -> None:
    with torch.inference_mode():
        output = model.loaded.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    texts = model.loaded.processor.batch_decode(new, skip_special_tokens=True)
    for case, text in zip(cases, texts, strict=True):
        rows[case.row].answer = text.strip()
    if model.pruned is not None:
        images = model.pruned.report.images
        if not images:  # a batch job that compresses nothing is not what anybody asked for
            raise UnsupportedError(
                f"{model.pruned.spec!r} reduced no picture; has the model fewer layers than it "
                "names?"
            )
        counts = model.loaded.placeholders(inputs["input_ids"])
        of_prompts = _by_prompt(images, len(cases), counts)
        for case, seen in zip(cases, of_prompts, strict=True):
            rows[case.row].before = sum(image.before for image in seen)
            rows[case.row].after = sum(image.after for image in seen)


def _by_prompt(
    images: Sequence[ImageReport], prompts: int, placeholders: Sequence[int] | None
) -> list[Sequence[ImageReport]]:
    """What became of the picture of each prompt; of several tiles, where a model reports tiles.

    >>> one, two = ImageReport(4, 2), ImageReport(4, 1)
    >>> [len(each) for each in _by_prompt([one, two, two], 2, [8, 4])]
    [2, 1]
    """
    if prompts == 1:
        return [images]
    if len(images) == prompts:
        return [[image] for image in images]
    if placeholders is None:
        raise UnsupportedError(
            f"the model reports {len(images)} pictures of {prompts} prompts with one each, and its "
            "config names no placeholder by which to tell whose they are; use a batch size of 1"
        )
    each = sum(placeholders) // len(images)  # tiles have as many placeholders as each other
    ends = list(itertools.accumulate(count // each for count in placeholders))
    return [images[start:end] for start, end in itertools.pairwise([0, *ends])]
