"""Answer of a model, and what compression did on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..errors import AttachError
from ..loading import Loaded
from ..report import Report
from ..strategy import Reduction
from .errors import CommandError
from .timing import attached

if TYPE_CHECKING:
    from transformers import BatchFeature


@dataclass(frozen=True)
class Answer:
    """Answer of the model; report and reduction are None for vanilla."""

    text: str
    report: Report | None = None
    reduction: Reduction | None = None


def answer(loaded: Loaded, inputs: BatchFeature, spec: str | None, tokens: int) -> Answer:
    """Generate greedily under `spec`, or without compression where it is None.

    Args:
        loaded: the model, not attached.
        inputs: inputs of one prompt, exactly as the processor made them.
        spec: what to attach.
        tokens: longest answer.

    Raises:
        CommandError: the spec reduced nothing, so there is nothing to report.
    """
    with attached(loaded.model, spec) as pruned, torch.inference_mode():
        output = loaded.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    text: str = loaded.processor.decode(new, skip_special_tokens=True).strip()
    if pruned is None:
        return Answer(text)
    try:
        return Answer(text, pruned.report, pruned.last)
    except AttachError as error:
        raise CommandError(
            f"{spec!r} reduced nothing; does this model have such layers?"
        ) from error
