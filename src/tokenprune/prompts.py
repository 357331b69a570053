"""Prompts with a placeholder, made from questions by a chat template."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import ProcessorMixin


def prompter(processor: ProcessorMixin) -> Callable[[str], str]:
    """Put questions into the chat template of `processor`; those with a placeholder stay."""

    def text(question: str) -> str:
        placeholder: str = processor.image_token
        if placeholder in question:
            return question
        if processor.chat_template is None:
            raise UnsupportedError(
                "the checkpoint has no chat template; write the whole prompt with "
                f"{placeholder} where the picture goes"
            )
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        turns = [{"role": "user", "content": parts}]
        filled: str = processor.apply_chat_template(turns, add_generation_prompt=True)
        return filled

    return text
