"""Trials: what an adapter offers to the doctor, so that its models can be compared by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn


class Answer(NamedTuple):
    """Output of a model for a batch of prompts.

    Attributes:
        text: `(rows, steps)` int64 ids that were generated; no steps for a model without text.
        logits: `(rows, passes, channels)` of every pass, or whatever the model returns.
    """

    text: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Cut:
    """Stage to attach, and the same thing done by hand.

    Attributes:
        where: words for the place, such as ``"before the LLM"``.
        spec: what is attached; empty for nothing.
        by_hand: `(text, shift)` to the logits that a vanilla model gives for the tokens that `spec`
            should keep, when `text` is generated. It uses nothing of the adapter. With a `shift`,
            the tokens that many places further are kept instead, in every picture.
    """

    where: str
    spec: str
    by_hand: Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Questions:
    """Prompts for one model: how it is asked, attached or not, and the cuts to make.

    Attributes:
        ask: calls the model as users do; the same for every cut.
        cuts: each is attached, asked, compared and detached, in this order.
    """

    ask: Callable[[], Answer]
    cuts: Sequence[Cut]


@dataclass(frozen=True)
class Trial:
    """Tiny random model of one class, and how models of the class are run by hand.

    Attributes:
        name: name of the class, and of what it is made of where that matters.
        module: top module of the library that brings the class; nothing is tried without it.
        build: function that makes the tiny model, the same every time, in eval mode. Its weights
            must be so peaked that keeping other tokens moves logits by more than 1.
        questions: prompts for a model of the class: the tiny one, or a checkpoint of a user.
    """

    name: str
    module: str
    build: Callable[[], nn.Module]
    questions: Callable[[nn.Module], Questions]
