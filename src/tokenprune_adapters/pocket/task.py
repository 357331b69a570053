"""The pocket task: pictures of a few coloured objects, and questions with one-word answers.

Everything is drawn from a seed, so a benchmark is a range of integers. Pictures of the "test"
split, the default, use handwriting and random streams that training never uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .drawing import CLUTTER, COLOURS, KINDS, SIDE, Split, Stroke, paint

T = TypeVar("T")

PATCH = 8
GRID = SIDE // PATCH
QUADRANTS = ("top-left", "top-right", "bottom-left", "bottom-right")
COUNTS = ("2", "3", "4")

_CELL = 15  # pixels; four cells leave four pixels, by which the grid of a picture is shifted
_COLOUR_NAMES = tuple(COLOURS)


@dataclass(frozen=True)
class Object:
    """A thing in a picture.

    Attributes:
        kind: a name of `KINDS`; for clutter, of `CLUTTER`.
        colour: a name of `COLOURS`; for clutter, "gray".
        cell: (row, column) in the 4 x 4 grid of cells.
        box: (left, top, right, bottom) in pixels, right and bottom exclusive.
    """

    kind: str
    colour: str
    cell: tuple[int, int]
    box: tuple[int, int, int, int]

    @property
    def quadrant(self) -> str:
        """The quarter of the picture that holds the object's centre."""
        left, top, right, bottom = self.box
        return QUADRANTS[2 * (top + bottom > SIDE) + (left + right > SIDE)]

    @property
    def patches(self) -> NDArray[np.bool_]:
        """`(8, 8)` bool, True where the box covers more than a quarter of a patch."""
        left, top, right, bottom = self.box
        start = PATCH * np.arange(GRID)
        wide = np.clip(np.minimum(start + PATCH, right) - np.maximum(start, left), 0, None)
        high = np.clip(np.minimum(start + PATCH, bottom) - np.maximum(start, top), 0, None)
        covered: NDArray[np.bool_] = np.outer(high, wide) > PATCH * PATCH // 4
        return covered


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture and the truth about it.

    Attributes:
        seed: what it was drawn from.
        split: "test" or "train".
        image: `(64, 64, 3)` uint8.
        objects: the two to four coloured objects, of distinct kinds, that questions ask about.
        clutter: gray things that no question asks about.
    """

    seed: int
    split: Split
    image: NDArray[np.uint8]
    objects: tuple[Object, ...]
    clutter: tuple[Object, ...]

    @property
    def picture(self) -> Image.Image:
        """The image as Pillow has it."""
        return Image.fromarray(self.image)

    @property
    def object_mask(self) -> NDArray[np.bool_]:
        """`(8, 8)` bool, True where a patch shows one of `objects`."""
        mask: NDArray[np.bool_] = np.any([thing.patches for thing in self.objects], axis=0)
        return mask


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
        type: a name of `QUESTION_TYPES`.
        text: lower-case words and a question mark.
        answer: one word.
    """

    type: str
    text: str
    answer: str


def draw(seed: int, split: Split = "test") -> Scene:
    """Draw one scene; the same seed and split give the same scene everywhere.

    >>> [thing.kind for thing in draw(3).objects] == [thing.kind for thing in draw(3).objects]
    True
    """
    rng = _stream(seed, split, 0)
    count = int(rng.integers(2, 5))
    kinds = rng.permutation(len(KINDS))[:count]
    cells = rng.permutation(16)
    shift = rng.integers(0, SIDE - 4 * _CELL + 1, 2)
    # The first colour is unlike the others, so that one object at least is known by its colour.
    first = int(rng.integers(6))
    hues = [first, *(int(other) for other in (first + rng.integers(1, 6, count - 1)) % 6)]
    strokes: list[Stroke] = []

    objects = []
    for kind, hue, cell in zip(kinds, hues, cells, strict=False):
        name, place = _COLOUR_NAMES[hue], (int(cell) // 4, int(cell) % 4)
        box = _place(rng, place, shift, 11)
        rgb = np.clip(np.array(COLOURS[name]) + rng.integers(-24, 25, 3), 0, 255)
        objects.append(Object(KINDS[kind], name, place, box))
        strokes.append(Stroke(KINDS[kind], _rgb(rgb), box, int(rng.integers(1 << 16))))

    clutter = []
    for cell in cells[count:][rng.random(16 - count) < 0.4]:
        kind, place = CLUTTER[int(rng.integers(len(CLUTTER)))], (int(cell) // 4, int(cell) % 4)
        box = _place(rng, place, shift, 9)
        gray = rng.integers(40, 216) + rng.integers(-6, 7, 3)
        clutter.append(Object(kind, "gray", place, box))
        strokes.append(Stroke(kind, _rgb(gray), box))

    return Scene(seed, split, paint(strokes, rng, split), tuple(objects), tuple(clutter))


def questions(scene: Scene, variant: int = 0) -> tuple[Question, ...]:
    """Ask one question of each type, and two of existence, of which one is answered by no.

    Args:
        scene: what to ask about.
        variant: another number asks about other objects.
    """
    rng = _stream(scene.seed, scene.split, 1 + variant)
    return tuple(asked for ask in _ASKERS.values() for asked in ask(scene, rng))


def _colour(scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
    thing = _pick(scene.objects, rng)
    return (Question("colour", f"what colour is the {thing.kind} ?", thing.colour),)


def _kind(scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
    colours = [thing.colour for thing in scene.objects]
    thing = _pick([one for one in scene.objects if colours.count(one.colour) == 1], rng)
    return (Question("kind", f"what kind is the {thing.colour} object ?", thing.kind),)


def _existence(scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
    """One yes, and one no that is half true: mostly a colour and a kind of different objects."""
    pairs = {(thing.colour, thing.kind) for thing in scene.objects}
    here = _pick(scene.objects, rng)
    seen = [thing.colour for thing in scene.objects]
    kinds = [thing.kind for thing in scene.objects]
    crossed = [(c, k) for c in dict.fromkeys(seen) for k in kinds if (c, k) not in pairs]
    recoloured = [(c, k) for c in _COLOUR_NAMES if c not in seen for k in kinds]
    reshaped = [(c, k) for c in seen for k in KINDS if k not in kinds]
    absent = _pick(_pick([crossed, crossed, recoloured, reshaped], rng), rng)
    return (
        Question("existence", f"is there a {here.colour} {here.kind} ?", "yes"),
        Question("existence", f"is there a {absent[0]} {absent[1]} ?", "no"),
    )


def _count(scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
    return (Question("count", "how many objects are there ?", str(len(scene.objects))),)


def _where(scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
    thing = _pick(scene.objects, rng)
    return (Question("where", f"where is the {thing.kind} ?", thing.quadrant),)


_ASKERS: dict[str, Callable[[Scene, np.random.Generator], tuple[Question, ...]]] = {
    "colour": _colour,
    "kind": _kind,
    "existence": _existence,
    "count": _count,
    "where": _where,
}
QUESTION_TYPES = tuple(_ASKERS)

ANSWERS = (*COLOURS, *KINDS, "yes", "no", *COUNTS, *QUADRANTS)
WORDS = (
    *("what", "colour", "is", "the", "?", "kind", "object", "there", "a"),
    *("how", "many", "objects", "are", "where", *ANSWERS),
)


def _stream(seed: int, split: Split, purpose: int) -> np.random.Generator:
    """Independent random numbers for each seed, split and purpose."""
    return np.random.Generator(np.random.PCG64([seed, split == "train", purpose]))


def _place(
    rng: np.random.Generator, cell: tuple[int, int], shift: NDArray[np.int64], smallest: int
) -> tuple[int, int, int, int]:
    """A square box somewhere in a cell."""
    size = int(rng.integers(smallest, _CELL + 1))
    slack = rng.integers(0, _CELL - size + 1, 2)
    top, left = (_CELL * cell[axis] + int(shift[axis] + slack[axis]) for axis in (0, 1))
    return left, top, left + size, top + size


def _rgb(values: NDArray[np.int64]) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in values)
    return red, green, blue


def _pick(options: Sequence[T], rng: np.random.Generator) -> T:
    return options[int(rng.integers(len(options)))]
