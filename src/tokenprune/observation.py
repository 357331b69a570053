"""Observations: what hooks note of a vision tower's signals and of an LLM's attention.

An adapter fills them, `observe` and `watch` hand them to the user; every thread has its own.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from einops import reduce
from torch import Tensor

from .errors import AttachError, MissingSignalError, ShapeError
from .hooks import NotCopyable
from .signals import Signal, Signals
from .tokens import VisualTokens


class Observation(NotCopyable):
    """Observation of one forward pass of a vision tower: its visual tokens and signals.

    Every thread sees its own passes. An adapter calls `begin` when the tower starts and `finish`
    when it is done; in between it keeps what it needs in `scratch`.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def begin(self) -> None:
        """Forget the previous pass of this thread."""
        self._forget()
        self._local.scratch = {}

    @property
    def running(self) -> bool:
        """Whether the tower is at work in this thread.

        A layer may also run without its tower, when gradient checkpointing recomputes it.
        """
        return getattr(self._local, "scratch", None) is not None

    @property
    def scratch(self) -> dict[object, Tensor]:
        """Tensors that hooks of one pass hand to each other."""
        if not self.running:
            raise AttachError("a layer of the tower ran outside of the tower's own forward")
        scratch: dict[object, Tensor] = self._local.scratch
        return scratch

    def forget(self) -> None:
        """Give up the pass of this thread that is under way; one that is complete stays."""
        if self.running:
            self._forget()

    def finish(self, tokens: VisualTokens, signals: Mapping[Signal, Tensor]) -> None:
        """Publish what this pass gave."""
        self._forget()
        self._local.tokens = tokens
        self._local.signals = Signals(signals)

    def take(self) -> tuple[VisualTokens, Signals]:
        """The latest pass of this thread, which is then forgotten."""
        taken = self.tokens, self.signals
        self._forget()
        return taken

    def _forget(self) -> None:
        # One by one: older torch cannot trace a thread's attributes as a dict.
        self._local.scratch = self._local.tokens = self._local.signals = None

    @property
    def ready(self) -> bool:
        """Whether a pass of this thread is there to be read."""
        return getattr(self._local, "tokens", None) is not None

    @property
    def tokens(self) -> VisualTokens:
        """Visual tokens of the latest pass: the features of the layer asked for, without [CLS]."""
        if not self.ready:
            raise MissingSignalError("the tower has not run yet, so there is nothing to read")
        tokens: VisualTokens = self._local.tokens
        return tokens

    @property
    def signals(self) -> Signals:
        """Signals of the latest pass."""
        if not self.ready:
            raise MissingSignalError("the tower has not run yet, so there is nothing to read")
        signals: Signals = self._local.signals
        return signals


class Attended(NotCopyable):
    """Attention rows of the newest token of each prompt over the visual tokens, pass by pass.

    The first pass is that over the prompt, whose last token asks; in every later one asks a token
    that was generated. Every thread sees its own latest prompts. An adapter calls `begin` where a
    pass brings pictures, and `step` at the end of this pass and of each one that continues it.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def begin(self, patches: Tensor) -> None:
        """Forget the previous prompts of this thread.

        Args:
            patches: `(images, tokens)` int64, the patch that each visual token is, counted as
                `VisualTokens.patches` are; -1 is padding.
        """
        if patches.ndim != 2:
            raise ShapeError(f"patches must have axes (images tokens), got {tuple(patches.shape)}")
        self._local.patches = patches
        self._local.steps = []

    def step(self, attention: Tensor) -> None:
        """Note what was attended to in one pass.

        Args:
            attention: `(images, layers, heads, tokens)`: of the newest token of the prompt that
                an image is in, softmax over all keys, of which the image's are taken.
        """
        images, tokens = self.patches.shape
        if attention.ndim != 4 or (attention.shape[0], attention.shape[3]) != (images, tokens):
            raise ShapeError(
                f"attention must have axes (images layers heads tokens) with {images} images of "
                f"{tokens} tokens, got {tuple(attention.shape)}"
            )
        mean = reduce(
            attention.float(), "images layers heads tokens -> images layers tokens", "mean"
        )
        self._local.steps.append(mean.masked_fill(~self.mask[:, None].to(mean.device), 0))

    def forget(self) -> None:
        """Give up the prompts of this thread: others came, without pictures."""
        self._local.__dict__.clear()

    @property
    def patches(self) -> Tensor:
        """`(images, tokens)` int64, the patch that each visual token is; -1 is padding."""
        if not hasattr(self._local, "patches"):
            raise MissingSignalError("no prompt with pictures has run, so there is nothing to read")
        patches: Tensor = self._local.patches
        return patches

    @property
    def mask(self) -> Tensor:
        """`(images, tokens)` bool, False where an image has fewer tokens than others."""
        return self.patches >= 0

    @property
    def steps(self) -> Tensor:
        """`(steps, images, layers, tokens)` float32, mean over heads; zero for padding.

        Step 0: the last token of the prompt asks; step k: the k-th token that was generated. One
        that ended its text asks nothing.
        """
        images, tokens = self.patches.shape
        steps: list[Tensor] = self._local.steps
        return torch.stack(steps) if steps else torch.zeros(0, images, 0, tokens)
