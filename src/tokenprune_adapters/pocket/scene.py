"""Scenes of the pocket task: a few coloured objects among clutter, drawn from a seed."""

from __future__ import annotations

from collections.abc import Sequence
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


CELL = 15  # pixels; four cells leave four pixels, by which the grid of a picture is shifted


COLOUR_NAMES = tuple(COLOURS)


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
        box: box of the plate.
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
        texture: texture of the background, a name of `TEXTURES`.
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


def draw(seed: int, split: Split = "test") -> Scene:
    """Draw one scene; the same seed and split give the same scene everywhere.

    >>> [thing.kind for thing in draw(3).objects] == [thing.kind for thing in draw(3).objects]
    True
    """
    rng = stream(seed, split, 0)
    count = int(rng.integers(2, 5))
    kinds = rng.permutation(len(KINDS))[:count]
    shift = rng.integers(0, SIDE - 4 * CELL + 1, 2)
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
        name, box = COLOUR_NAMES[hue], _place(rng, place, shift, 11)
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


def stream(seed: int, split: Split, purpose: int) -> np.random.Generator:
    """Independent random numbers for each seed, split and purpose."""
    return np.random.Generator(np.random.PCG64([seed, split == "train", purpose]))


def _sign(
    rng: np.random.Generator, cell: tuple[int, int], shift: NDArray[np.int64]
) -> tuple[Sign, list[Stroke]]:
    """A sign in a cell and the one to its right, and how to paint it."""
    size = int(rng.integers(11, 14))
    wide, high = 2 * size + 2, size + 2
    slack = int(rng.integers(0, 2 * CELL - wide + 1)), int(rng.integers(0, CELL - high + 1))
    left, top = (CELL * cell[1 - axis] + int(shift[1 - axis]) + slack[axis] for axis in (0, 1))
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
    size = int(rng.integers(smallest, CELL + 1))
    slack = rng.integers(0, CELL - size + 1, 2)
    top, left = (CELL * cell[axis] + int(shift[axis] + slack[axis]) for axis in (0, 1))
    return left, top, left + size, top + size


def _rgb(values: NDArray[np.int64]) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in values)
    return red, green, blue


def pick(options: Sequence[T], rng: np.random.Generator) -> T:
    """One of `options`, at random."""
    return options[int(rng.integers(len(options)))]
