"""Questions of the pocket task about a scene, with one-word answers.

Everything is drawn from a seed, so a benchmark is a range of integers. Pictures of the "test"
split, the default, use handwriting and random streams that training never uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .drawing import CLUTTER, COLOURS, KINDS, TEXTURES
from .scene import CELL, COLOUR_NAMES, COUNTS, NUMERALS, QUADRANTS, Object, Scene, pick, stream

SIDES = ("left of", "right of", "above", "below")


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


def questions(scene: Scene, variant: int = 0) -> tuple[Question, ...]:
    """Ask one question of each type; of existence and relation two, of which one is no.

    Args:
        scene: what to ask about.
        variant: another number asks about other objects.
    """
    rng = stream(scene.seed, scene.split, 1 + variant)
    return tuple(asked for ask in _ASKERS.values() for asked in ask(scene, rng))


def _colour(scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
    thing = pick(scene.objects, rng)
    return (Question("colour", f"what colour is the {thing.kind} ?", thing.colour),)


def _kind(scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
    colours = [thing.colour for thing in scene.objects]
    thing = pick([one for one in scene.objects if colours.count(one.colour) == 1], rng)
    return (Question("kind", f"what kind is the {thing.colour} object ?", thing.kind),)


def _existence(scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
    """One yes, and one no that is half true: mostly a colour and a kind of different objects."""
    pairs = {(thing.colour, thing.kind) for thing in scene.objects}
    here = pick(scene.objects, rng)
    seen = [thing.colour for thing in scene.objects]
    kinds = [thing.kind for thing in scene.objects]
    crossed = [(c, k) for c in dict.fromkeys(seen) for k in kinds if (c, k) not in pairs]
    recoloured = [(c, k) for c in COLOUR_NAMES if c not in seen for k in kinds]
    reshaped = [(c, k) for c in seen for k in KINDS if k not in kinds]
    absent = pick(pick([crossed, crossed, recoloured, reshaped], rng), rng)
    return (
        Question("existence", f"is there a {here.colour} {here.kind} ?", "yes"),
        Question("existence", f"is there a {absent[0]} {absent[1]} ?", "no"),
    )


def _count(scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
    return (Question("count", "how many objects are there ?", str(len(scene.objects))),)


def _where(scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
    thing = pick(scene.objects, rng)
    return (Question("where", f"where is the {thing.kind} ?", thing.quadrant),)


def _relation(scene: Scene, rng: np.random.Generator) -> tuple[Question, ...]:
    """One yes and one no, about objects whose centres are at least half a cell apart."""

    def ask(truth: bool) -> Question:
        first, second, axis, sooner = pick(_apart(scene.objects), rng)
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
                if abs(gap) >= CELL:  # twice the distance of the centres
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
