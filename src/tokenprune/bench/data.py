"""Samples: pictures, questions and accepted answers, from files or from the pocket task."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import TokenpruneError
from ..folders import list_pictures
from ..pictures import PictureError, read_picture
from ..shipped_adapters import pocket_model

DESCRIBE = "Describe the image in one sentence."
_NAMED = 5  # files that a message names before it counts


class DataError(TokenpruneError, ValueError):
    """Data to ask about that cannot be read."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Question about a picture, with the answers that are accepted.

    Attributes:
        id: unlike that of any other sample.
        image: a file, or the picture itself.
        question: without placeholder or chat template.
        answers: each is right; ten or more are those of annotators, as in VQAv2. May be empty.
        type: what kind of question; results are reported for each apart.
        group: names the picture: samples of one group are not independent. Empty for a picture
            that no other sample is about, which is then named after the sample.
        truth: `(patches,)` float32, how much each patch of the model's grid matters, for the
            oracle; None where nobody knows.
    """

    id: str
    image: Path | Image.Image
    question: str
    answers: tuple[str, ...] = ()
    type: str = "all"
    group: str = ""
    truth: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", self.group or self.id)

    def picture(self) -> Image.Image:
        """The picture in RGB (see `tokenprune.pictures`).

        Raises:
            DataError: the file is missing, no picture, or its numbers have no sure meaning.
        """
        named = isinstance(self.image, str | Path)
        try:
            return read_picture(self.image, None if named else f"of {self.id!r}")
        except PictureError as error:
            raise DataError(str(error)) from error


def read(path: Path | str, prompt: str = DESCRIBE) -> list[Sample]:
    """Read questions from JSON lines, or pictures from a folder.

    A line is an object with `image` (a file name, relative to the JSON lines) and `question`, and
    may have `answers` (a list) or `answer`, `type` and `id`. A folder that holds one `.jsonl` file
    is that file; without one, every picture in it is asked `prompt`, and a warning names what is
    passed over.

    Args:
        path: a `.jsonl` file or a folder.
        prompt: what to ask about pictures without questions.

    Raises:
        DataError: nothing there, a line that does not say what is needed, or a picture that is not
            there; names the line.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        tables = sorted(path.glob("*.jsonl"))
        if len(tables) > 1:
            raise DataError(f"{path} holds {len(tables)} .jsonl files; give one of them")
        if not tables:
            return _pictures(path, prompt)
        path = tables[0]
    if not path.is_file():
        raise DataError(f"there is no file or folder {path}")
    samples = list(_lines(path))
    if not samples:
        raise DataError(f"{path} holds no questions")
    ids = [sample.id for sample in samples]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise DataError(f"the id {twice!r} stands twice in {path}")
    return samples


def pocket(full: bool = False) -> list[Sample]:
    """Pocket-VQA: fixed questions about fixed pictures that the pocket model was not trained on.

    Args:
        full: 2,089 questions about 500 pictures; else 300 of them, of all types alike.
    """
    task = pocket_model()
    samples = []
    for number in range(500):
        scene = task.draw(number)
        truth = torch.from_numpy(scene.object_scores.reshape(-1))
        for place, one in enumerate(task.questions(scene)):
            if (place + 2 * number) % 5 < 2:  # types take turns, yes and no too
                name = f"pocket-{number}-{place}"
                group = f"pocket-{number}"
                samples.append(
                    Sample(name, scene.picture, one.text, (one.answer,), one.type, group, truth)
                )
    return samples if full else _spread(samples, 300)


def _spread(samples: list[Sample], count: int) -> list[Sample]:
    """`count` of `samples`, as many of each type as of any other, from everywhere."""
    types = list(dict.fromkeys(sample.type for sample in samples))
    chosen: set[str] = set()
    for place, name in enumerate(types):
        same = [sample.id for sample in samples if sample.type == name]
        share = count // len(types) + (place < count % len(types))
        chosen |= {same[index * len(same) // share] for index in range(share)}
    return [sample for sample in samples if sample.id in chosen]


def _pictures(folder: Path, prompt: str) -> list[Sample]:
    listing = list_pictures(folder, deep=False)
    others = [f"{name} ({why})" for name, why in listing.passed_over]
    if len(others) > _NAMED:
        others[_NAMED:] = [f"and {len(others) - _NAMED} more"]
    if not listing.pictures:
        raise DataError(
            f"{folder} holds neither a .jsonl file nor pictures"
            + (f", but {', '.join(others)}" if others else "")
        )
    if others:
        warnings.warn(f"passed over in {folder}: {', '.join(others)}", stacklevel=3)
    return [Sample(name, folder / name, prompt, group=name) for name in listing.pictures]


def _lines(path: Path) -> Iterator[Sample]:
    try:
        with path.open(encoding="utf-8-sig") as lines:  # some editors begin files with a mark
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _sample(line, path, number)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8: {error}") from error


def _sample(line: str, path: Path, number: int) -> Sample:
    where = f"line {number} of {path}"
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict) or not {"image", "question"} <= row.keys():
        raise DataError(f'{where} must be an object with "image" and "question"')
    for name in ("image", "question"):
        if not isinstance(row[name], str):
            raise DataError(f'"{name}" in {where} must be a text, got {row[name]!r}')
    answers = row.get("answers", [row["answer"]] if "answer" in row else [])
    if not isinstance(answers, list):
        raise DataError(f'"answers" in {where} must be a list, got {type(answers).__name__}')
    for answer in answers:
        if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
            raise DataError(f"an answer in {where} must be a text or a number, got {answer!r}")
    named = Path(row["image"])
    image = path.parent / named
    if not image.is_file():
        raise DataError(f"there is no picture {image}, which {where} asks about")
    return Sample(
        id=str(row.get("id", number)),
        image=image,
        question=row["question"],
        answers=tuple(map(str, answers)),
        type=str(row.get("type", "all")),
        group=str(named),
    )
