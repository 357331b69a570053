"""Which slots of a prompt are visual, and of which image: to the tokens of images and back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenprune.errors import UnsupportedError
from tokenprune.plan import Plan

from ..fingerprint import fingerprint
from ..layout import Layout

CHANNELS = 64
"""Channels of the projected features that go into an image's fingerprint."""


def feature_prints(features: Tensor) -> Tensor:
    """`(images,)` int64 of projected features `(images, tokens, channels)`, marks included."""
    return fingerprint(features[..., :CHANNELS])


@dataclass(frozen=True, eq=False)
class Images:
    """The images of a batch of prompts.

    Attributes:
        number: `(batch, slots)` int64, images counted over the whole batch; -1 is not visual.
        place: `(batch, slots)` int64, place within the image.
        tokens: slots per image in the prompt as the processor made it.
        prints: `(images,)` int64, one number per image from its features.
    """

    number: Tensor
    place: Tensor
    tokens: int
    prints: Tensor

    @classmethod
    def of(cls, visual: Tensor, tokens: int) -> Images:
        """From `(batch, slots)` bool placeholders, `tokens` of them per image."""
        rank = visual.flatten().cumsum(0).reshape(visual.shape) - 1
        number = torch.where(visual, rank // tokens, -1)
        place = torch.where(visual, rank % tokens, 0)
        return cls(number, place, tokens, number.new_zeros(0))

    def within(self, embeds: Tensor, layout: Layout | None) -> Images:
        """These images as a segment sees them, with fingerprints of their features.

        Args:
            embeds: `(batch, slots, channels)` of the whole prompt, marks included.
            layout: what the segment leaves out, or None.

        Raises:
            UnsupportedError: a prompt holds part of an image only (chunked prefill).
        """
        visual = self.number >= 0
        if bool((visual.sum(1) % self.tokens != 0).any()):
            raise UnsupportedError(
                f"a forward pass holds part of an image ({self.tokens} tokens each); chunked "
                "prefill cannot be combined with reduction after a layer, drop prefill_chunk_size"
            )
        features = embeds[visual].reshape(-1, self.tokens, embeds.shape[-1])
        known = replace(self, prints=feature_prints(features))
        return known if layout is None else known.through(layout)

    def through(self, layout: Layout) -> Images:
        """These images after `layout` has left slots out."""
        # Fillers come out as zero, so numbers travel as one more.
        number = layout.shorten(self.number + 1) - 1
        return replace(self, number=number, place=layout.shorten(self.place))

    def seats(self) -> Seats:
        """Where the tokens of each image sit. One sync."""
        batch, slots = self.number.shape
        flat = (self.number >= 0).flatten().nonzero().squeeze(1)
        image = self.number.flatten()[flat]
        count = torch.bincount(image, minlength=self.prints.shape[0])
        column = torch.arange(flat.shape[0], device=flat.device) - (count.cumsum(0) - count)[image]
        shape = count.shape[0], int(count.max())
        index = flat.new_zeros(shape)
        index[image, column] = flat
        mask = torch.zeros(shape, dtype=torch.bool, device=flat.device)
        mask[image, column] = True
        return Seats(index, mask, batch, slots)


@dataclass(frozen=True, eq=False)
class Seats:
    """Where the tokens of each image sit in a batch of prompts.

    Attributes:
        index: `(images, tokens)` int64 into `batch * slots`.
        mask: `(images, tokens)` bool, False where an image has fewer tokens.
        batch: prompts.
        slots: per prompt.
    """

    index: Tensor
    mask: Tensor
    batch: int
    slots: int

    @property
    def row(self) -> Tensor:
        """`(images)` int64, the prompt that each image is in."""
        return self.index[:, 0] // self.slots

    @property
    def column(self) -> Tensor:
        """`(images, tokens)` int64, the slot of the prompt."""
        return self.index % self.slots

    def take(self, x: Tensor) -> Tensor:
        """`(batch, slots, ...)` to `(images, tokens, ...)`; padding is zero."""
        taken = x.flatten(0, 1).index_select(0, self.index.flatten())
        taken = taken.reshape(*self.index.shape, *x.shape[2:])
        return taken.masked_fill(~self.mask.reshape(*self.mask.shape, *(1,) * (x.ndim - 2)), 0)

    def dropped(self, plan: Plan) -> Tensor:
        """`(batch, slots)` bool: tokens that are no anchor of `plan`."""
        # One slot more, to which padding is written.
        drop = self.mask.new_zeros(self.batch * self.slots + 1)
        drop[self.index.masked_fill(~self.mask, -1).flatten()] = True
        drop[self._anchors(plan).flatten()] = False
        return drop[:-1].reshape(self.batch, self.slots)

    def merge(self, hidden: Tensor, plan: Plan) -> Tensor:
        """`(batch, slots, channels)` with what `plan` makes of each group at its anchor."""
        flat = torch.cat([hidden.flatten(0, 1), hidden.new_zeros(1, hidden.shape[2])])
        merged = plan(self.take(hidden)).flatten(0, 1)
        anchors = self._anchors(plan).flatten() % flat.shape[0]
        return flat.index_copy(0, anchors, merged)[:-1].reshape(hidden.shape)

    def _anchors(self, plan: Plan) -> Tensor:
        """`(images, kept)` int64 into `batch * slots`, -1 for padding."""
        return self.index.gather(1, plan.anchors).masked_fill(~plan.mask, -1)
