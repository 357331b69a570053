"""Image slots: which slots of a prompt are visual, and which patch of which image each is."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenprune.errors import UnsupportedError
from tokenprune.gather import gather_flat, zero_fillers
from tokenprune.kept_patches import Origin
from tokenprune.plan import Plan
from tokenprune.to_device import numbers_on, sent

from ...kit.fingerprint import fingerprint
from ...kit.prompt_layout import PromptLayout

CHANNELS = 64
"""Channels of the projected features that go into an image's fingerprint."""


def feature_prints(features: Tensor | Sequence[Tensor]) -> Tensor:
    """`(images,)` int64 of projected features, marks included.

    Args:
        features: `(images, slots, channels)`, or `(slots, channels)` of each image. Zeros behind
            the slots of an image change nothing.
    """
    if not isinstance(features, Tensor):
        features = pad_sequence([each[:, :CHANNELS] for each in features], batch_first=True)
    return fingerprint(features[..., :CHANNELS])


@dataclass(frozen=True, eq=False)
class Images:
    """Images of a batch of prompts, or videos, or whatever shares a budget.

    Some slots of an image may hold no patch, such as the newlines of LLaVA-NeXT: these are no
    visual tokens, and stay.

    Attributes:
        image: `(batch, slots)` int64, the image of each slot, counted over the whole batch; -1 is
            text.
        patch: `(batch, slots)` int64, which patch of its image a slot is; -1 is none.
        slots: number of slots of each image in the prompt as the processor made it.
        tokens: number of visual tokens of each image: slots with a patch.
        prints: `(images,)` int64, one number per image from its features.
        row: `(images,)` int64, the prompt that each image is in.
        origins: what each image is: a picture, a video, or a frame.
        known: `prints` and `row` as numbers, once somebody has asked.
        left: number of visual tokens that are left of each image, once somebody has asked.
    """

    image: Tensor
    patch: Tensor
    slots: tuple[int, ...]
    tokens: tuple[int, ...]
    prints: Tensor
    row: Tensor
    origins: tuple[Origin, ...]
    known: tuple[list[int], list[int]] = ([], [])
    left: tuple[int, ...] = ()

    @classmethod
    def alike(cls, placeholders: Tensor, images: int, tokens: int) -> Images:
        """From `(batch, slots)` bool placeholders, `tokens` patches per image and nothing else."""
        rank = placeholders.flatten().cumsum(0).reshape(placeholders.shape) - 1
        image = torch.where(placeholders, rank // tokens, -1)
        patch = torch.where(placeholders, rank % tokens, -1)
        whole = (tokens,) * images
        none = image.new_zeros(0)
        origins = tuple(Origin(number) for number in range(images))
        return cls(image, patch, whole, whole, none, none, origins)

    @classmethod
    def of(
        cls, placeholders: Tensor, patches: Sequence[Tensor], origins: Sequence[Origin] = ()
    ) -> Images:
        """From `(batch, slots)` bool placeholders and what they hold.

        Args:
            placeholders: bool mask of the slots of all images, in order.
            patches: for each image `(slots,)` int64 on the CPU: the patch that each slot is, or
                -1.
            origins: what each image is; a picture, if nothing is said.
        """
        slots = tuple(map(len, patches))
        numbers, counts = (torch.tensor(x, device="cpu") for x in (range(len(slots)), slots))
        owners = torch.repeat_interleave(numbers, counts)
        held = sent(torch.stack([owners, torch.cat(list(patches))]), placeholders.device)
        rank = placeholders.flatten().cumsum(0).reshape(placeholders.shape) - 1
        image, patch = held[:, rank.clamp(min=0, max=sum(slots) - 1)]
        return cls(
            torch.where(placeholders, image, -1),
            torch.where(placeholders, patch, -1),
            slots,
            tuple(int((each >= 0).sum()) for each in patches),
            image.new_zeros(0),
            image.new_zeros(0),
            tuple(origins) or tuple(Origin(number) for number in range(len(slots))),
        )

    @property
    def visual(self) -> Tensor:
        """`(batch, slots)` bool: slots that hold a patch."""
        return self.patch >= 0

    def among(self, real: Tensor) -> Images:
        """These images without the patches that a mask hides.

        Args:
            real: `(batch, slots)` bool, False for what is hidden.
        """
        return replace(self, patch=self.patch.masked_fill(~real, -1))

    def printed(self, embeds: Tensor) -> Images:
        """These images with fingerprints and the prompts they are in.

        Args:
            embeds: `(batch, slots, channels)` of the whole prompt, marks included.
        """
        total = sum(self.slots)
        last = self.image.masked_fill(self.image < 0, len(self.slots)).flatten()
        order = torch.argsort(last, stable=True)[:total]
        features = embeds[..., :CHANNELS].flatten(0, 1).index_select(0, order)
        prints = feature_prints(torch.split(features, list(self.slots)))
        first = list(itertools.accumulate(self.slots[:-1], initial=0))
        row = order.index_select(0, numbers_on(order.device, first)) // self.image.shape[1]
        return replace(self, prints=prints, row=row)

    def facts(self) -> Tensor:
        """Numbers that stages need in Python, `(1 + 3 * images,)` int64; see `told`."""
        image = torch.where(self.visual, self.image, len(self.slots)).flatten()
        count = image.new_zeros(len(self.slots) + 1)
        count = count.scatter_add(0, image, torch.ones_like(image))[:-1]
        return torch.cat([(self.image >= 0).sum()[None], count, self.prints, self.row])

    def told(self, facts: list[int]) -> Images:
        """These images with what `facts` gave, as numbers.

        Raises:
            UnsupportedError: a prompt holds part of an image only (chunked prefill).
        """
        inside, rest, images = facts[0], facts[1:], len(self.slots)
        if inside != sum(self.slots):
            raise UnsupportedError(
                f"a forward pass holds part of an image ({self.slots} tokens); chunked "
                "prefill cannot be combined with reduction after a layer, drop prefill_chunk_size"
            )
        counts, prints, rows = (rest[n * images : (n + 1) * images] for n in range(3))
        return replace(self, left=tuple(counts), known=(prints, rows))

    def asked(self) -> Images:
        """These images with their `facts`, by a sync of their own."""
        return self.told(self.facts().tolist())

    def through(self, layout: PromptLayout) -> Images:
        """These images after `layout` has left slots out."""
        # Fillers come out as zero, so numbers travel as one more.
        image, patch = (layout.shorten(each + 1) - 1 for each in (self.image, self.patch))
        return replace(self, image=image, patch=patch)

    def seats(self) -> Seats:
        """Seats of the tokens of each image, whose numbers are known."""
        batch, slots = self.patch.shape
        image = torch.where(self.visual, self.image, len(self.left)).flatten()
        order = torch.argsort(image, stable=True)[: sum(self.left)]
        index = pad_sequence(list(torch.split(order, list(self.left))), batch_first=True)
        count = numbers_on(index.device, self.left)[:, None]
        mask = torch.arange(index.shape[1], device=index.device) < count
        return Seats(index, mask, batch, slots, self.left)


@dataclass(frozen=True, eq=False)
class Seats:
    """Seats of the tokens of each image in a batch of prompts.

    Attributes:
        index: `(images, tokens)` int64 into `batch * slots`.
        mask: `(images, tokens)` bool, False where an image has fewer tokens.
        batch: number of prompts.
        slots: per prompt.
    """

    index: Tensor
    mask: Tensor
    batch: int
    slots: int
    lengths: tuple[int, ...]

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
        return zero_fillers(gather_flat(x, self.index), self.mask)

    def dropped(self, plan: Plan) -> Tensor:
        """`(batch, slots)` bool: tokens that are no anchor of `plan`."""
        # One slot more, to which padding is written.
        drop = self.mask.new_zeros(self.batch * self.slots + 1)
        last = drop.shape[0] - 1
        drop.index_fill_(0, self.index.masked_fill(~self.mask, last).flatten(), True)
        anchors = self._anchors(plan).flatten()
        drop.index_fill_(0, anchors.masked_fill(anchors < 0, last), False)
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
