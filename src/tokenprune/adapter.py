"""Adapters connect strategies to models: what they implement, and what core gives them.

A `TowerAdapter` reads signals from a vision tower without changing what it returns. A
`ModelAdapter` puts stages to work in a whole model, and may tell what its language model attends
to. All install hooks by yielding every handle as it is made; core removes them, also when an
installation fails half-way.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import NoReturn, Protocol

import torch
from einops import reduce
from torch import Tensor, nn

from .errors import AttachError, MissingSignalError, ShapeError, UnsupportedError
from .placement import Placement
from .report import Record
from .signals import Signal, Signals
from .strategy import Stage
from .tokens import VisualTokens


class Removable(Protocol):
    """A handle of something installed, such as torch's hooks return."""

    def remove(self) -> None:
        """Undo it."""


class NotCopyable:
    """State that hooks hold. A copied or pickled model would share it, so that is refused."""

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise AttachError("detach before copying a model: its hooks would serve the original")

    def __reduce__(self) -> NoReturn:
        raise AttachError(
            "detach before pickling a model; ship the spec instead and attach where it is loaded"
        )


class Observation(NotCopyable):
    """What one forward pass of a vision tower gave: its visual tokens and signals.

    Every thread sees its own passes. An adapter calls `begin` when the tower starts and `finish`
    when it is done; in between it keeps what it needs in `scratch`.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def begin(self) -> None:
        """Forget the previous pass of this thread."""
        self._local.__dict__.clear()
        self._local.scratch = {}

    @property
    def running(self) -> bool:
        """Whether the tower is at work in this thread.

        A layer may also run without its tower, when gradient checkpointing recomputes it.
        """
        return hasattr(self._local, "scratch")

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
            self._local.__dict__.clear()

    def finish(self, tokens: VisualTokens, signals: Mapping[Signal, Tensor]) -> None:
        """Publish what this pass gave."""
        self._local.__dict__.clear()
        self._local.tokens = tokens
        self._local.signals = Signals(signals)

    def take(self) -> tuple[VisualTokens, Signals]:
        """The latest pass of this thread, which is then forgotten."""
        taken = self.tokens, self.signals
        self._local.__dict__.clear()
        return taken

    @property
    def ready(self) -> bool:
        """Whether a pass of this thread is there to be read."""
        return hasattr(self._local, "tokens")

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
    """What the newest token of each prompt attended to among the visual tokens, pass by pass.

    The first pass is that over the prompt, whose last token asks; in every later one asks a token
    that was generated. Every thread sees its own latest prompts. An adapter calls `begin` where a
    pass brings pictures, and `step` at the end of this pass and of each one that continues it.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def begin(self, places: Tensor) -> None:
        """Forget the previous prompts of this thread.

        Args:
            places: `(images, tokens)` int64, the patch that each visual token is, counted as
                `VisualTokens.positions` are; -1 is padding.
        """
        if places.ndim != 2:
            raise ShapeError(f"places must have axes (images tokens), got {tuple(places.shape)}")
        self._local.places = places
        self._local.steps = []

    def step(self, attention: Tensor) -> None:
        """Note what was attended to in one pass.

        Args:
            attention: `(images, layers, heads, tokens)`: of the newest token of the prompt that
                an image is in, softmax over all keys, of which the image's are taken.
        """
        images, tokens = self.places.shape
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
    def places(self) -> Tensor:
        """`(images, tokens)` int64, the patch that each visual token is; -1 is padding."""
        if not hasattr(self._local, "places"):
            raise MissingSignalError("no prompt with pictures has run, so there is nothing to read")
        places: Tensor = self._local.places
        return places

    @property
    def mask(self) -> Tensor:
        """`(images, tokens)` bool, False where an image has fewer tokens than others."""
        return self.places >= 0

    @property
    def steps(self) -> Tensor:
        """`(steps, images, layers, tokens)` float32, mean over heads; zero for padding.

        Step 0: the last token of the prompt asks; step k: the k-th token that was generated. One
        that ended its text asks nothing.
        """
        images, tokens = self.places.shape
        steps: list[Tensor] = self._local.steps
        return torch.stack(steps) if steps else torch.zeros(0, images, 0, tokens)


class TowerAdapter(ABC):
    """Reads signals from a kind of vision tower, by hooks, without touching what it returns."""

    @abstractmethod
    def provides(self, tower: nn.Module) -> frozenset[type[Signal]]:
        """The kinds of signal that `tower` can give."""

    @abstractmethod
    def install(
        self,
        tower: nn.Module,
        signals: frozenset[Signal],
        observation: Observation,
        feature_layer: int,
    ) -> Iterator[Removable]:
        """Yield the handle of every hook as it is made.

        After each forward pass of `tower`, `observation.finish` has been called once with the
        visual tokens and every one of `signals`.

        Args:
            tower: the tower.
            signals: what to compute; attention as rows, never as matrices.
            observation: where to put it.
            feature_layer: Python-style index of the block whose output is the features.
        """


class ModelAdapter(ABC):
    """Puts stages to work in a kind of model, by hooks."""

    @abstractmethod
    def provides(self, model: nn.Module, placement: Placement) -> frozenset[type[Signal]]:
        """The kinds of signal that strategies can read at `placement` of `model`.

        Raises:
            UnsupportedError: `placement` is not offered, or `model` has an option that cannot be
                served; the message says what would work.
        """

    @abstractmethod
    def install(
        self, model: nn.Module, stages: tuple[Stage, ...], record: Record
    ) -> Iterator[Removable]:
        """Yield the handle of every hook as it is made.

        Args:
            model: the model.
            stages: what to do, each at a placement that `provides` has accepted.
            record: where to note what was done.
        """

    def watch(self, model: nn.Module, attended: Attended) -> Iterator[Removable]:
        """Yield the handle of every hook that reads what the language model attends to. Optional.

        Args:
            model: the model, which computes what it always does.
            attended: where to note it; attention as rows, never as matrices.

        Raises:
            UnsupportedError: this adapter does not offer it, or cannot for `model`.
        """
        raise UnsupportedError(
            f"{type(self).__name__} cannot tell what a {type(model).__name__} attends to: it does "
            "not implement ModelAdapter.watch"
        )
