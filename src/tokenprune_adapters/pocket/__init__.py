"""Pocket model: a trained miniature LLaVA, small enough to ship, and the task of its training.

>>> scene = draw(7)
>>> prompt(questions(scene)[3])
'USER: <image> is there a red circle ? ASSISTANT:'

`load` gives the model and its processor; importing this package imports neither torch nor
transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .drawing import Split
from .scene import Object, Scene, draw
from .task import ANSWERS, QUESTION_TYPES, Question, questions

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

__all__ = [
    "ANSWERS",
    "CHECKPOINT",
    "QUESTION_TYPES",
    "Object",
    "Question",
    "Scene",
    "Split",
    "draw",
    "load",
    "prompt",
    "questions",
]

CHECKPOINT = Path(__file__).with_name("checkpoint")


def prompt(question: Question | str) -> str:
    """The text that the processor wants, together with a picture, for one question."""
    text = question.text if isinstance(question, Question) else question
    return f"USER: <image> {text} ASSISTANT:"


def load(
    dtype: torch.dtype | None = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The trained model, ready to answer, and its processor; nothing is downloaded.

    Args:
        dtype: dtype of the weights; None for float32.

    Raises:
        MissingExtraError: transformers is not installed.
        MissingWeightsError: the checkpoint is not where it should be.
    """
    from tokenprune.errors import MissingExtraError

    from .errors import MissingWeightsError

    try:
        import torch
        from transformers import AutoProcessor, LlavaForConditionalGeneration
    except ImportError as error:
        raise MissingExtraError(
            "the pocket model needs transformers, which cannot be imported; "
            "pip install 'tokenprune-vlm[hf]'"
        ) from error
    if not (CHECKPOINT / "model.safetensors").is_file():
        raise MissingWeightsError(
            f"no weights in {CHECKPOINT}; reinstall tokenprune-vlm, or train them in a clone "
            "of its repository: make train"
        )
    model = LlavaForConditionalGeneration.from_pretrained(
        CHECKPOINT, dtype=dtype or torch.float32, local_files_only=True
    )
    processor = AutoProcessor.from_pretrained(CHECKPOINT, local_files_only=True)
    return model, processor
