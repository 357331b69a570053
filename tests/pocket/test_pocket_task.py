from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from tokenprune_adapters import pocket
from tokenprune_adapters.pocket.drawing import COLOURS, DIGITS, KINDS, SIDE, _scans
from tokenprune_adapters.pocket.task import QUADRANTS, WORDS

SCENES = [pocket.draw(seed) for seed in range(200)]


def digest(seeds: range, split: pocket.Split) -> str:
    """What the pictures and the questions of some seeds come down to."""
    total = hashlib.sha256()
    for seed in seeds:
        scene = pocket.draw(seed, split)
        total.update(scene.image.tobytes())
        total.update(repr((scene.objects, scene.clutter, pocket.questions(scene))).encode())
    return total.hexdigest()[:16]


def true_answer(scene: pocket.Scene, question: pocket.Question) -> str:
    """Answer from the list of objects and the words of the question alone."""
    words = question.text.removesuffix(" ?").split()
    if words[0] == "how":
        return str(len(scene.objects))
    if words[:2] == ["is", "there"]:
        colour, kind = words[-2:]
        return "yes" if any((o.colour, o.kind) == (colour, kind) for o in scene.objects) else "no"
    if words[:2] == ["what", "kind"]:
        (thing,) = [o for o in scene.objects if o.colour == words[-2]]
        return thing.kind
    (thing,) = [o for o in scene.objects if o.kind == words[-1]]
    if words[0] == "where":
        row, column = thing.cell
        return f"{'top' if row < 2 else 'bottom'}-{'left' if column < 2 else 'right'}"
    assert words[:2] == ["what", "colour"]
    return thing.colour


def test_answers_are_true() -> None:
    for scene in SCENES:
        for question in pocket.questions(scene):
            assert question.answer == true_answer(scene, question), (scene.seed, question)


def test_every_type_is_asked_in_known_words() -> None:
    for scene in SCENES:
        asked = pocket.questions(scene)
        assert {question.type for question in asked} == set(pocket.QUESTION_TYPES)
        for question in asked:
            assert {*question.text.split(), question.answer} <= set(WORDS)
            assert question.answer in pocket.ANSWERS


def test_existence_is_balanced_and_its_no_is_half_true() -> None:
    for scene in SCENES:
        asked = [question for question in pocket.questions(scene) if question.type == "existence"]
        assert sorted(question.answer for question in asked) == ["no", "yes"]
        for question in asked:
            colour, kind = question.text.split()[-3:-1]
            assert any(o.colour == colour or o.kind == kind for o in scene.objects)


def test_variants_ask_otherwise_and_repeat() -> None:
    scene = pocket.draw(3)
    assert pocket.questions(scene, 1) == pocket.questions(scene, 1)
    assert len({pocket.questions(scene, variant) for variant in range(8)}) > 1


@pytest.mark.parametrize("split", ["test", "train"])
def test_layout(split: pocket.Split) -> None:
    for seed in range(100):
        scene = pocket.draw(seed, split)
        things = scene.objects + scene.clutter
        kinds = [thing.kind for thing in scene.objects]
        assert 2 <= len(kinds) == len(set(kinds)) <= 4
        assert len({thing.cell for thing in things}) == len(things)
        taken = np.zeros((SIDE, SIDE), int)
        for thing in things:
            left, top, right, bottom = thing.box
            assert 0 <= left < right <= SIDE
            assert 0 <= top < bottom <= SIDE
            taken[top:bottom, left:right] += 1
            row, column = thing.cell
            assert thing.quadrant == QUADRANTS[2 * (row > 1) + (column > 1)]
            assert thing.patches.any()
        assert taken.max() == 1


def test_pixels_show_the_objects() -> None:
    names, palette = list(COLOURS), np.array(list(COLOURS.values()))
    for scene in SCENES:
        assert scene.image.shape == (SIDE, SIDE, 3)
        assert scene.image.dtype == np.uint8
        for thing in scene.objects:
            if thing.kind in ("circle", "square", "star", "cross"):
                x, y = (thing.box[0] + thing.box[2]) // 2, (thing.box[1] + thing.box[3]) // 2
                seen = scene.image[y - 1 : y + 2, x - 1 : x + 2].mean((0, 1))
                assert names[abs(palette - seen).sum(1).argmin()] == thing.colour


def test_object_mask() -> None:
    scene = SCENES[0]
    expected = np.zeros((8, 8), bool)
    for thing in scene.objects:
        area = np.zeros((SIDE, SIDE))
        left, top, right, bottom = thing.box
        area[top:bottom, left:right] = 1
        expected |= area.reshape(8, 8, 8, 8).mean((1, 3)) > 0.25
    assert (scene.object_mask == expected).all()
    assert 0.1 < np.mean([other.object_mask for other in SCENES]) < 0.25


def test_picture_is_the_image() -> None:
    assert (np.asarray(SCENES[0].picture) == SCENES[0].image).all()


def test_kinds_and_colours_all_appear() -> None:
    things = [thing for scene in SCENES for thing in scene.objects]
    assert {thing.kind for thing in things} == set(KINDS)
    assert {thing.colour for thing in things} == set(COLOURS)


def test_splits_share_neither_pictures_nor_handwriting() -> None:
    assert digest(range(5), "test") != digest(range(5), "train")
    for digit in DIGITS:
        shown, held_out = (
            {scan.tobytes() for scan in _scans(split)[digit]} for split in ("train", "test")
        )
        assert shown
        assert held_out
        assert not shown & held_out


def test_pictures_are_the_same_on_every_machine() -> None:
    """If this fails on purpose, the shipped weights no longer fit: train them again."""
    assert digest(range(20), "test") == "b1977feedd394868"


def test_draw_in_another_process_and_light_import() -> None:
    script = (
        "import hashlib, sys\n"
        "from tokenprune_adapters import pocket\n"
        "print(hashlib.sha256(pocket.draw(11).image.tobytes()).hexdigest())\n"
        "print(*{'torch', 'transformers', 'sklearn'} & set(sys.modules))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    picture, heavy = done.stdout.split("\n")[:2]
    assert picture == hashlib.sha256(pocket.draw(11).image.tobytes()).hexdigest()
    assert heavy == ""


def test_prompt() -> None:
    question = pocket.questions(pocket.draw(7))[3]
    expected = f"USER: <image> {question.text} ASSISTANT:"
    assert pocket.prompt(question) == pocket.prompt(question.text) == expected
