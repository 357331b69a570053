"""Stage 1: the vision tower learns to say, from [CLS], which kinds are there in which colour."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from .drawing import COLOURS, KINDS
from .loop import Stage, Step
from .model import FEATURE_LAYER, MEAN, STD, WIDTH
from .task import GRID, QUADRANTS, Scene, draw

_HUES = tuple(COLOURS)


class TowerLessons(nn.Module):
    """The vision tower of a model, and linear read-outs that are thrown away after training.

    [CLS] answers for each kind: absent, or its colour. An auxiliary loss asks each patch, at the
    layer whose features the language model gets, for the kind and the colour of the object on it
    and for the quarter of the picture it lies in.
    """

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        self.facts = nn.Linear(WIDTH, len(KINDS) * (1 + len(COLOURS)))
        self.patch = nn.Linear(WIDTH, 1 + len(KINDS) + 1 + len(COLOURS) + len(QUADRANTS))

    def forward(self, scenes: Sequence[Scene]) -> tuple[Tensor, float]:
        """The loss, and the fraction of objects whose colour [CLS] knows."""
        output = self.tower(pixels(scenes), output_hidden_states=True)
        facts = self.facts(output.pooler_output).unflatten(1, (len(KINDS), 1 + len(COLOURS)))
        truth = _facts(scenes)
        loss = functional.cross_entropy(facts.flatten(0, 1), truth.flatten())

        readings = self.patch(output.hidden_states[FEATURE_LAYER][:, 1:]).flatten(0, 1)
        sizes = (1 + len(KINDS), 1 + len(COLOURS), len(QUADRANTS))
        for reading, target in zip(readings.split(sizes, 1), _patches(scenes), strict=True):
            loss = loss + functional.cross_entropy(reading, target)

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


def _facts(scenes: Sequence[Scene]) -> Tensor:
    """`(scenes, kinds)` int64: 0 for absent, else 1 + the colour's index."""
    facts = torch.zeros(len(scenes), len(KINDS), dtype=torch.int64)
    for row, scene in zip(facts, scenes, strict=True):
        for thing in scene.objects:
            row[KINDS.index(thing.kind)] = 1 + _HUES.index(thing.colour)
    return facts


def _patches(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """Kind, colour (0 for none) and quarter of each patch, three times `(scenes * 64)` int64."""
    kinds = np.zeros((len(scenes), GRID, GRID), np.int64)
    hues = np.zeros_like(kinds)
    for kind, hue, scene in zip(kinds, hues, scenes, strict=True):
        for thing in scene.objects:
            kind[thing.patches] = 1 + KINDS.index(thing.kind)
            hue[thing.patches] = 1 + _HUES.index(thing.colour)
    half = np.arange(GRID) >= GRID // 2
    quarters = np.broadcast_to(2 * half[:, None] + half, kinds.shape)
    flat = [torch.from_numpy(target.reshape(-1)) for target in (kinds, hues, quarters.copy())]
    return flat[0], flat[1], flat[2]
