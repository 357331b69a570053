"""Run: one forward pass of a language model with something reduced, and our private keywords."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenprune.kept_patches import Origin
from tokenprune.plan import Plan
from tokenprune.signals import Signal, Signals

from ..attention import Asked
from .deepstack import DeepStack
from .image_slots import Images, Seats
from .segment import Pass, Segment

RUN = "tokenprune_run"
"""Name of the private argument that takes a `Run` to the layers, which pop it."""

TEXT = "tokenprune_text"
"""Name of the private argument that says that a pass brings no pictures, so nothing is searched."""

IMAGES = "tokenprune_images"
"""Name of the private argument that makes `Images`, which tell which slots are visual, or None."""

VISUAL = "tokenprune_visual"
"""Name of the private argument that brings a bool for each slot: whether it is a placeholder."""


@dataclass(eq=False)
class Run:
    """Run of a language model: one forward pass with something reduced.

    The hook before the model makes it and knows the first segment; stages inside the model add
    theirs as their layers come.

    Attributes:
        whole: the pass as its caller sees it.
        segments: by the number of their first layer, in order.
        images: which slots of the latest segment are visual, where stages inside want to know.
        known: signals of the vision tower about the tokens that are left of the images.
        counts: tokens of each image, by the layer from which on they are left; 0 is the input.
        origins: what each image is, for the report; None for a copy of another one.
        seats: where the visual tokens of the latest segment sit, once a layer has asked.
        asked: queries and keys of the latest segment, by layer, that a stage will read.
        rows: attention rows of the text of the latest segment, by signal and layer.
        rotary: cosine and sine of each segment but the first, by its first layer.
        given: arguments by name of all layers of a segment, by its first layer.
        merges: what stages have merged, by their layer.
        flash: whether the attention is FlashAttention.
        deepstack: features that are added between layers, where the model has any.
    """

    whole: Pass
    segments: dict[int, Segment]
    images: Images | None = None
    known: Signals | None = None
    counts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    origins: tuple[Origin | None, ...] = ()
    seats: Seats | None = None
    asked: dict[int, Asked] = field(default_factory=dict)
    rows: dict[tuple[type[Signal], int], Tensor] = field(default_factory=dict)
    rotary: dict[int, Any] = field(default_factory=dict)
    given: dict[int, dict[str, Any]] = field(default_factory=dict)
    merges: dict[int, tuple[Seats, Plan]] = field(default_factory=dict)
    flash: bool = False
    deepstack: DeepStack | None = None

    @property
    def concerns_layers(self) -> bool:
        """Whether layers have anything to decide, or to get that the model does not give them."""
        first = self.segments[0]
        same = all(
            each.mask is first.mask and each.positions is first.positions
            for each in self.segments.values()
        )
        # Where the model is traced, it may make a mask of its own where it is told of none.
        more = self.images is not None or self.deepstack is not None
        return more or self.flash or not same or torch.compiler.is_compiling()

    def start_of(self, layer: int) -> int:
        """The first layer of the segment that `layer` belongs to, as far as is known."""
        return max(start for start in self.segments if start <= layer)

    def segment_of(self, layer: int) -> Segment:
        """The segment that `layer` belongs to, as far as is known."""
        return self.segments[self.start_of(layer)]

    def restore(self, x: Tensor, layer: int) -> Tensor:
        """Hidden states of the segment of `layer` back at the caller's slots."""
        for start in sorted(self.segments, reverse=True):
            layout = self.segments[start].layout
            if start <= layer and layout is not None:
                x = layout.restore(x)
        return x
