"""Which slots of a prompt are visual, and of which image."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenprune.errors import UnsupportedError

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

    def slots(self) -> tuple[Tensor, Tensor]:
        """Each image's tokens: `(images, tokens)` index into `batch * slots`, and mask."""
        flat = (self.number >= 0).flatten().nonzero().squeeze(1)
        image = self.number.flatten()[flat]
        count = torch.bincount(image, minlength=self.prints.shape[0])
        column = torch.arange(flat.shape[0], device=flat.device) - (count.cumsum(0) - count)[image]
        shape = count.shape[0], int(count.max())
        index = flat.new_zeros(shape)
        index[image, column] = flat
        mask = torch.zeros(shape, dtype=torch.bool, device=flat.device)
        mask[image, column] = True
        return index, mask
