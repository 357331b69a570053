"""Lessons of stage 1: the tower learns to say, from [CLS], which kinds are there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from tokenprune_adapters.pocket.drawing import CLUTTER, COLOURS, KINDS, TEXTURES
from tokenprune_adapters.pocket.scene import COUNTS, GRID, NUMERALS, Scene, covered, draw

from .loop import Stage, Step
from .model import FEATURE_LAYER, MEAN, STD, WIDTH

_HUES = tuple(COLOURS)
_OBJECTS = int(COUNTS[-1])
_READINGS = {
    "kind": 1 + len(KINDS),
    "colour": 1 + len(COLOURS),
    "number": 1 + _OBJECTS,  # objects are numbered as one reads
    "numeral": 1 + 2 * len(NUMERALS),  # of the sign, left and right
    "clutter": 1 + len(CLUTTER),
    "texture": len(TEXTURES),
    "row": GRID,
    "column": GRID,
}
"""What a patch is asked for, and how many answers there are; 0 is "none" where that can be."""
_FACTS = 5.0  # of a kind, mostly "absent"
_WEIGHTS = {"kind": 3.0, "number": 2.0}  # the hardest to learn


class TowerLessons(nn.Module):
    """The vision tower of a model, and linear read-outs that are thrown away after training.

    [CLS] answers for each kind: absent, or its colour; and for both places of the sign: absent, or
    its numeral. An auxiliary loss asks each patch, at the layer whose features the language model
    gets, for what `_READINGS` lists.
    """

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        self.facts = nn.Linear(WIDTH, len(KINDS) * (1 + len(COLOURS)))
        self.sign = nn.Linear(WIDTH, 2 * (1 + len(NUMERALS)))
        self.patch = nn.Linear(WIDTH, sum(_READINGS.values()))

    def forward(self, scenes: Sequence[Scene]) -> tuple[Tensor, float]:
        """The loss, and the fraction of objects whose colour [CLS] knows."""
        output = self.tower(pixels(scenes), output_hidden_states=True)
        facts = self.facts(output.pooler_output).unflatten(1, (len(KINDS), 1 + len(COLOURS)))
        sign = self.sign(output.pooler_output).unflatten(1, (2, 1 + len(NUMERALS)))
        truth, numerals = _facts(scenes)
        loss = _FACTS * functional.cross_entropy(facts.flatten(0, 1), truth.flatten())
        loss = loss + functional.cross_entropy(sign.flatten(0, 1), numerals.flatten())

        patches = self.patch(output.hidden_states[FEATURE_LAYER][:, 1:]).flatten(0, 1)
        readings = patches.split([*_READINGS.values()], 1)
        targets = _patches(scenes).flatten(1)
        for name, reading, target in zip(_READINGS, readings, targets, strict=True):
            loss = loss + _WEIGHTS.get(name, 1.0) * functional.cross_entropy(reading, target)

        there = truth > 0
        known = facts.argmax(-1)[there] == truth[there]
        return loss, known.float().mean().item()


def lessons(module: TowerLessons, stage: Stage, seed: int) -> Step:
    """Every step shows pictures that were never shown before."""

    def step(number: int) -> tuple[Tensor, float]:
        start = (seed << 32) + number * stage.batch
        loss, accuracy = module([draw(start + i, "train") for i in range(stage.batch)])
        return loss, accuracy

    return step


def pixels(scenes: Sequence[Scene]) -> Tensor:
    """`(scenes, 3, 64, 64)` float32, just as the image processor makes them."""
    images = torch.from_numpy(np.stack([scene.image for scene in scenes])).float()
    images = rearrange(images, "scenes height width channels -> scenes channels height width")
    return (images / 255 - MEAN[0]) / STD[0]


def _facts(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """`(scenes, kinds)` and `(scenes, 2)` int64: 0 for absent, else 1 + the index of the answer."""
    facts = torch.zeros(len(scenes), len(KINDS), dtype=torch.int64)
    numerals = torch.zeros(len(scenes), 2, dtype=torch.int64)
    for row, pair, scene in zip(facts, numerals, scenes, strict=True):
        for thing in scene.objects:
            row[KINDS.index(thing.kind)] = 1 + _HUES.index(thing.colour)
        if scene.sign:
            for place, numeral in enumerate(scene.sign.text):
                pair[place] = 1 + NUMERALS.index(numeral)
    return facts, numerals


def _patches(scenes: Sequence[Scene]) -> Tensor:
    """The answer of each patch to each of `_READINGS`, `(readings, scenes, 8, 8)` int64."""
    answers = np.zeros((len(_READINGS), len(scenes), GRID, GRID), np.int64)
    kinds, hues, numbers, numerals, clutter, textures, rows, columns = answers
    for index, scene in enumerate(scenes):
        for number, thing in enumerate(sorted(scene.objects, key=lambda one: one.cell), 1):
            kinds[index][thing.patches] = 1 + KINDS.index(thing.kind)
            hues[index][thing.patches] = 1 + _HUES.index(thing.colour)
            numbers[index][thing.patches] = number
        for thing in scene.clutter:
            clutter[index][thing.patches] = 1 + CLUTTER.index(thing.kind)
        if scene.sign:
            for place, (numeral, box) in enumerate(
                zip(scene.sign.text, scene.sign.digits, strict=True)
            ):
                code = 1 + place * len(NUMERALS) + NUMERALS.index(numeral)
                numerals[index][covered(box)] = code
        textures[index] = TEXTURES.index(scene.texture)
    rows[:] = np.arange(GRID)[:, None]
    columns[:] = np.arange(GRID)
    return torch.from_numpy(answers)
