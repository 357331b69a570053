"""Ask a model about pictures, through its processor and `generate`, and count right answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from . import prompt
from .drawing import SIDE
from .task import QUESTION_TYPES, Question, Scene, questions

SALIENT = ("colour", "kind", "existence")


@dataclass(frozen=True)
class Score:
    """A mean over question types.

    Attributes:
        accuracy: between 0 and 1; each type weighs the same.
        error: its standard error; pictures, not questions, are taken as independent.
        questions: how many were asked.
    """

    accuracy: float
    error: float
    questions: int


def answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pictures: Sequence[Image.Image],
    asked: Sequence[Question],
    batch: int = 60,
) -> list[str]:
    """One answer for each pair of a picture and a question."""
    replies: list[str] = []
    for start in range(0, len(asked), batch):
        part = slice(start, start + batch)
        inputs = processor(
            images=list(pictures[part]),
            text=[prompt(question) for question in asked[part]],
            padding=True,
            return_tensors="pt",
        ).to(model.device, model.dtype)
        with torch.inference_mode():
            tokens = model.generate(**inputs)
        length = inputs["input_ids"].shape[1]
        replies += processor.batch_decode(tokens[:, length:], skip_special_tokens=True)
    return [reply.strip() for reply in replies]


def evaluate(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    scenes: Sequence[Scene],
    blind: bool = False,
) -> dict[str, Score]:
    """Score every question type apart, the mean over `SALIENT` types, and over all.

    Args:
        model: what to ask.
        processor: its processor.
        scenes: what to ask about.
        blind: show a gray picture instead, to see what can be guessed.
    """
    gray = Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
    rows = [(number, one) for number, scene in enumerate(scenes) for one in questions(scene)]
    asked = [question for _, question in rows]
    pictures = [gray if blind else scenes[number].picture for number, _ in rows]
    replies = answers(model, processor, pictures, asked)
    right = np.array([one.answer == reply for one, reply in zip(asked, replies, strict=True)])
    types = np.array([question.type for question in asked])
    groups = np.array([number for number, _ in rows])
    return {
        **{name: score(right, types, groups, (name,)) for name in QUESTION_TYPES},
        "colour, kind, existence": score(right, types, groups, SALIENT),
        "all": score(right, types, groups, QUESTION_TYPES),
    }


def score(right: np.ndarray, types: np.ndarray, groups: np.ndarray, names: Sequence[str]) -> Score:
    """Accuracy over some question types, with a standard error clustered by picture.

    Args:
        right: `(questions,)` bool.
        types: `(questions,)` str, the type of each question.
        groups: `(questions,)` int, the picture of each question.
        names: the types to average over.
    """
    accuracy, pull, count = 0.0, np.zeros(groups.max() + 1), 0
    for name in names:
        of_type = types == name
        mean, share = right[of_type].mean(), 1 / (of_type.sum() * len(names))
        np.add.at(pull, groups[of_type], (right[of_type] - mean) * share)
        accuracy, count = accuracy + float(mean) / len(names), count + int(of_type.sum())
    return Score(accuracy, float(np.sqrt((pull**2).sum())), count)
