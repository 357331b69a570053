from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from tokenprune_adapters import pocket
from tokenprune_adapters.pocket.drawing import (
    CLUTTER,
    COLOURS,
    DIGITS,
    KINDS,
    SIDE,
    TEXTURES,
    _scans,
)
from tokenprune_adapters.pocket.scene import NUMERALS, QUADRANTS, covered
from tokenprune_adapters.pocket.task import WORDS

SCENES = [pocket.draw(seed) for seed in range(200)]


def digest(seeds: range, split: pocket.Split) -> str:
    """What the pictures and the questions of some seeds come down to."""
    total = hashlib.sha256()
    for seed in seeds:
        scene = pocket.draw(seed, split)
        total.update(scene.image.tobytes())
        total.update(
            repr((scene.objects, scene.sign, scene.clutter, pocket.questions(scene))).encode()
        )
    return total.hexdigest()[:16]


def true_answer(scene: pocket.Scene, question: pocket.Question) -> str:
    """Answer from the list of objects and the words of the question alone."""
    words = question.text.removesuffix(" ?").split()
    if words[0] == "how":
        return str(len(scene.objects))
    if words[:2] == ["is", "there"]:
        colour, kind = words[-2:]
        return "yes" if any((o.colour, o.kind) == (colour, kind) for o in scene.objects) else "no"
    if words == ["what", "does", "the", "sign", "read"]:
        assert scene.sign is not None
        return scene.sign.text
    if words == ["what", "is", "the", "background"]:
        return scene.texture
    if words == ["what", "shape", "is", "the", "clutter"]:
        (kind,) = {thing.kind for thing in scene.clutter}
        return kind
    if words[:2] == ["is", "the"]:
        one, other = (next(o for o in scene.objects if o.kind == words[at]) for at in (2, -1))
        axis = int(words[3] in ("above", "below"))
        sooner = one.box[axis] + one.box[axis + 2] < other.box[axis] + other.box[axis + 2]
        return "yes" if sooner == (words[3] in ("left", "above")) else "no"
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
        types = set(pocket.QUESTION_TYPES) - (set() if scene.sign else {"read"})
        assert {question.type for question in asked} == types
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


def test_relations_are_balanced_and_clear() -> None:
    for scene in SCENES:
        asked = [question for question in pocket.questions(scene) if question.type == "relation"]
        assert [question.answer for question in asked] == ["yes", "no"]
        for question in asked:
            words = question.text.split()
            one, other = (next(o for o in scene.objects if o.kind == words[at]) for at in (2, -2))
            axis = int(words[3] in ("above", "below"))
            gap = sum(one.box[axis::2]) - sum(other.box[axis::2])
            assert abs(gap) >= 15, "centres are at least half a cell apart"


def test_every_other_picture_has_a_sign_and_all_have_clutter_of_one_kind() -> None:
    signs = [scene.sign for scene in SCENES if scene.sign]
    assert 0.4 < len(signs) / len(SCENES) < 0.6
    assert {sign.text[place] for sign in signs for place in (0, 1)} == set(NUMERALS)
    assert {scene.texture for scene in SCENES} == set(TEXTURES)
    assert {scene.clutter[0].kind for scene in SCENES} == set(CLUTTER)
    for scene in SCENES:
        assert len(scene.clutter) >= 2
        assert len({thing.kind for thing in scene.clutter}) == 1


def test_textures_are_there_to_be_seen() -> None:
    """Differences of pixels two apart: along rows for stripes, along columns for lines."""
    for scene in SCENES:
        gray = scene.image.astype(float).mean(2)
        free = ~np.kron(np.any([covered(t.box) for t in _things(scene)], 0), np.ones((8, 8), bool))
        across = abs(gray[:, 2:] - gray[:, :-2])[free[:, 2:] & free[:, :-2]].mean()
        down = abs(gray[2:] - gray[:-2])[free[2:] & free[:-2]].mean()
        seen = {"plain": (0, 0), "striped": (1, 0), "lined": (0, 1), "checked": (1, 1)}
        assert (across > 14, down > 14) == seen[scene.texture], (scene.seed, across, down)


def _things(scene: pocket.Scene) -> list:
    return [*scene.objects, *scene.clutter, *([scene.sign] if scene.sign else [])]


def test_variants_ask_otherwise_and_repeat() -> None:
    scene = pocket.draw(3)
    assert pocket.questions(scene, 1) == pocket.questions(scene, 1)
    assert len({pocket.questions(scene, variant) for variant in range(8)}) > 1


@pytest.mark.parametrize("split", ["test", "train"])
def test_layout(split: pocket.Split) -> None:
    for seed in range(100):
        scene = pocket.draw(seed, split)
        things = scene.objects + scene.clutter
        signs = [scene.sign] if scene.sign else []
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
        for sign in signs:
            left, top, right, bottom = sign.box
            assert 0 <= left < right <= SIDE
            assert 0 <= top < bottom <= SIDE
            taken[top:bottom, left:right] += 1
            for one in sign.digits:
                assert left <= one[0] < one[2] <= right
                assert top <= one[1] < one[3] <= bottom
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
    for thing in [*scene.objects, *([scene.sign] if scene.sign else [])]:
        area = np.zeros((SIDE, SIDE))
        left, top, right, bottom = thing.box
        area[top:bottom, left:right] = 1
        expected |= area.reshape(8, 8, 8, 8).mean((1, 3)) > 0.25
    assert (scene.object_mask == expected).all()
    assert 0.1 < np.mean([other.object_mask for other in SCENES]) < 0.3


def test_an_oracle_shares_a_budget_among_all_objects() -> None:
    for scene in SCENES[:50]:
        scores = scene.object_scores
        assert ((scores > 0) == scene.object_mask).all()
        things = [covered(thing.box) for thing in scene.objects]
        things += [covered(box) for box in scene.sign.digits] if scene.sign else []
        for thing in things:
            assert scores[thing].max() == 1
        best = np.argsort(-scores.reshape(-1), kind="stable")[: len(things) + 1]  # the plate, too
        assert all(thing.reshape(-1)[best].any() for thing in things)


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
    assert digest(range(20), "test") == "d5bb3c77db3f6374"


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
