"""The pocket task: pictures of a few coloured objects, and questions with one-word answers.

Everything is drawn from a seed, so a benchmark is a range of integers. Pictures of the "test"
split, the default, use handwriting and random streams that training never uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .drawing import CLUTTER, COLOURS, DIGITS, KINDS, PLATE, SIDE, TEXTURES, Split, Stroke, paint

T = TypeVar("T")
Box: TypeAlias = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels, right and bottom exclusive."""

PATCH = 8
GRID = SIDE // PATCH
QUADRANTS = ("top-left", "top-right", "bottom-left", "bottom-right")
COUNTS = ("2", "3", "4")
NUMERALS = ("1", "3", "4", "6")  # of `DIGITS`
SIDES = ("left of", "right of", "above", "below")

_CELL = 15  # pixels; four cells leave four pixels, by which the grid of a picture is shifted
_COLOUR_NAMES = tuple(COLOURS)


def covered(box: Box) -> NDArray[np.bool_]:
    """`(8, 8)` bool, True where `box` covers more than a quarter of a patch."""
    patches: NDArray[np.bool_] = _pixels(box) > PATCH * PATCH // 4
    return patches


def _pixels(box: Box) -> NDArray[np.int64]:
    """`(8, 8)` how many pixels of each patch `box` covers."""
    left, top, right, bottom = box
    start = PATCH * np.arange(GRID)
    wide = np.clip(np.minimum(start + PATCH, right) - np.maximum(start, left), 0, None)
    high = np.clip(np.minimum(start + PATCH, bottom) - np.maximum(start, top), 0, None)
    pixels: NDArray[np.int64] = np.outer(high, wide)
    return pixels


@dataclass(frozen=True)
class Object:
    """A thing in a picture.

    Attributes:
        kind: a name of `KINDS`; for clutter, of `CLUTTER`.
        colour: a name of `COLOURS`; for clutter, "gray".
        cell: (row, column) in the 4 x 4 grid of cells.
        box: where it is, a square.
    """

    kind: str
    colour: str
    cell: tuple[int, int]
    box: Box

    @property
    def quadrant(self) -> str:
        """The quarter of the picture that holds the object's centre."""
        left, top, right, bottom = self.box
        return QUADRANTS[2 * (top + bottom > SIDE) + (left + right > SIDE)]

    @property
    def patches(self) -> NDArray[np.bool_]:
        """`(8, 8)` bool, True where the box covers more than a quarter of a patch."""
        return covered(self.box)


@dataclass(frozen=True)
class Sign:
    """A white plate with two handwritten digits.

    Attributes:
        text: two numerals, e.g. "46".
        box: of the plate.
        digits: a square for each numeral.
    """

    text: str
    box: Box
    digits: tuple[Box, Box]


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture and the truth about it.

    Attributes:
        seed: what it was drawn from.
        split: "test" or "train".
        image: `(64, 64, 3)` uint8.
        objects: the two to four coloured objects, of distinct kinds.
        sign: a plate with digits; every other picture has one.
        clutter: two or more gray things, all of one kind.
        texture: of the background, a name of `TEXTURES`.
    """

    seed: int
    split: Split
    image: NDArray[np.uint8]
    objects: tuple[Object, ...]
    sign: Sign | None
    clutter: tuple[Object, ...]
    texture: str

    @property
    def picture(self) -> Image.Image:
        """The image as Pillow has it."""
        return Image.fromarray(self.image)

    @property
    def object_mask(self) -> NDArray[np.bool_]:
        """`(8, 8)` bool, True where a patch shows one of `objects`, or the sign."""
        mask: NDArray[np.bool_] = self.object_scores > 0
        return mask

    @property
    def object_scores(self) -> NDArray[np.float32]:
        """`(8, 8)` in [0, 1], what an oracle would keep first: 0 where `object_mask` is False.

        The patch that an object covers most has 1, its next 1/2, then 1/3, ..., so that every
        budget is shared among all objects; both digits of the sign count as objects.
        """
        boxes = [thing.box for thing in self.objects]
        boxes += [*self.sign.digits, self.sign.box] if self.sign else []
        scores = np.zeros(GRID * GRID, np.float32)
        for box in boxes:
            order = np.argsort(-_pixels(box).reshape(-1), kind="stable")
            order = order[covered(box).reshape(-1)[order]]
            share = 1 / (1 + np.arange(len(order), dtype=np.float32))
            scores[order] = np.maximum(scores[order], share)
        return scores.reshape(GRID, GRID)


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
    shift = rng.integers(0, SIDE - 4 * _CELL + 1, 2)
    cells = [(int(cell) // 4, int(cell) % 4) for cell in rng.permutation(16)]
    # The first colour is unlike the others, so that one object at least is known by its colour.
    first = int(rng.integers(6))
    hues = [first, *(int(other) for other in (first + rng.integers(1, 6, count - 1)) % 6)]
    texture = TEXTURES[int(rng.integers(len(TEXTURES)))]
    strokes: list[Stroke] = []

    sign = None
    if rng.random() < 0.5:
        place = int(rng.integers(4)), int(rng.integers(3))
        cells = [cell for cell in cells if cell not in (place, (place[0], place[1] + 1))]
        sign, painted = _sign(rng, place, shift)
        strokes += painted

    objects = []
    for kind, hue, place in zip(kinds, hues, cells, strict=False):
        name, box = _COLOUR_NAMES[hue], _place(rng, place, shift, 11)
        rgb = np.clip(np.array(COLOURS[name]) + rng.integers(-24, 25, 3), 0, 255)
        objects.append(Object(KINDS[kind], name, place, box))
        strokes.append(Stroke(KINDS[kind], _rgb(rgb), box, int(rng.integers(1 << 16))))

    clutter = []
    litter = CLUTTER[int(rng.integers(len(CLUTTER)))]
    free = cells[count:]
    for number, place in enumerate(free):
        if number >= 2 and rng.random() >= 0.3:
            continue
        box = _place(rng, place, shift, 9)
        gray = rng.integers(40, 216) + rng.integers(-6, 7, 3)
        clutter.append(Object(litter, "gray", place, box))
        strokes.append(Stroke(litter, _rgb(gray), box))

    image = paint(strokes, texture, rng, split)
    return Scene(seed, split, image, tuple(objects), sign, tuple(clutter), texture)


def questions(scene: Scene, variant: int = 0) -> tuple[Question, ...]:
    """Ask one question of each type; of existence and relation two, of which one is no.

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


def _relation(scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
    """One yes and one no, about objects whose centres are at least half a cell apart."""

    def ask(truth: bool) -> Question:
        first, second, axis, sooner = _pick(_apart(scene.objects), rng)
        side = SIDES[2 * axis + (sooner != truth)]
        text = f"is the {first.kind} {side} the {second.kind} ?"
        return Question("relation", text, "yes" if truth else "no")

    return ask(True), ask(False)


def _apart(objects: Sequence[Object]) -> list[tuple[Object, Object, int, bool]]:
    """(one, other, axis, whether one comes first); axis 0 is left to right, 1 top to bottom."""
    found = []
    for one in objects:
        for other in objects:
            for axis in (0, 1):
                gap = one.box[axis] + one.box[axis + 2] - other.box[axis] - other.box[axis + 2]
                if abs(gap) >= _CELL:  # twice the distance of the centres
                    found.append((one, other, axis, gap < 0))
    return found


def _read(scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
    if scene.sign is None:
        return ()
    return (Question("read", "what does the sign read ?", scene.sign.text),)


def _texture(scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
    return (Question("texture", "what is the background ?", scene.texture),)


def _clutter(scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
    return (Question("clutter", "what shape is the clutter ?", scene.clutter[0].kind),)


_ASKERS: dict[str, Callable[[Scene, np.random.Generator], tuple[Question, ...]]] = {
    "colour": _colour,
    "kind": _kind,
    "existence": _existence,
    "count": _count,
    "where": _where,
    "relation": _relation,
    "read": _read,
    "texture": _texture,
    "clutter": _clutter,
}
QUESTION_TYPES = tuple(_ASKERS)

ANSWERS = (
    *(*COLOURS, *KINDS, "yes", "no", *COUNTS, *QUADRANTS, *TEXTURES, *CLUTTER),
    *(one + other for one in NUMERALS for other in NUMERALS),
)
WORDS = (
    *("what", "colour", "is", "the", "?", "kind", "object", "there", "a"),
    *("how", "many", "objects", "are", "where", "left", "right", "of", "above", "below"),
    *("does", "sign", "read", "background", "shape", "clutter"),
    *ANSWERS,
)


def _stream(seed: int, split: Split, purpose: int) -> np.random.Generator:
    """Independent random numbers for each seed, split and purpose."""
    return np.random.Generator(np.random.PCG64([seed, split == "train", purpose]))


def _sign(
    rng: np.random.Generator, cell: tuple[int, int], shift: NDArray[np.int64]
) -> tuple[Sign, list[Stroke]]:
    """A sign in a cell and the one to its right, and how to paint it."""
    size = int(rng.integers(11, 14))
    wide, high = 2 * size + 2, size + 2
    slack = int(rng.integers(0, 2 * _CELL - wide + 1)), int(rng.integers(0, _CELL - high + 1))
    left, top = (_CELL * cell[1 - axis] + int(shift[1 - axis]) + slack[axis] for axis in (0, 1))
    plate = (left, top, left + wide, top + high)
    light, ink = _rgb(rng.integers(225, 251, 3)), _rgb(rng.integers(10, 41, 3))
    strokes, squares, text = [Stroke(PLATE, light, plate)], [], ""
    for place, digit in enumerate(rng.integers(0, len(DIGITS), 2)):
        start = left + 1 + place * size
        squares.append((start, top + 1, start + size, top + 1 + size))
        strokes.append(Stroke(DIGITS[digit], ink, squares[-1], int(rng.integers(1 << 16))))
        text += NUMERALS[digit]
    return Sign(text, plate, (squares[0], squares[1])), strokes


def _place(
    rng: np.random.Generator, cell: tuple[int, int], shift: NDArray[np.int64], smallest: int
) -> Box:
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
