"""`VisualTokens`: one padded batch of visual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .errors import ShapeError
from .on_read import Maker, OnRead
from .plan import Plan


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """Visual tokens in a padded batch. A row is the set of tokens that share one budget.

    Build one with `VisualTokens.of(features)`; the fields left out get their neutral values.

    Attributes:
        features: `(batch, tokens, channels)` any floating dtype.
        mask: `(batch, tokens)` bool, False where a row is padded.
        patches: `(batch, tokens)` int64, which patch of its picture each token is, in raster order.
        sizes: `(batch, tokens)` float32, how many original tokens each one stands for (ToMe).
        protected: `(batch, tokens)` bool, tokens that must survive unmerged (registers).
        ids: `(batch,)` int64, which image a row shows: equal for equal pictures, and independent
            of what else is in the batch. Seeds what is random, per image. A function may be given
            in its place, which makes it when it is first read.

    >>> VisualTokens.of(torch.zeros(2, 576, 1024)).lengths
    (576, 576)
    """

    features: Tensor
    mask: Tensor
    patches: Tensor
    sizes: Tensor
    protected: Tensor
    ids: OnRead = OnRead()  # noqa: RUF009, a descriptor is no default

    def __post_init__(self) -> None:
        features = self.features
        if features.ndim != 3 or not features.is_floating_point():
            raise ShapeError(
                "features must be floating with axes (batch tokens channels), "
                f"got {features.dtype} {tuple(features.shape)}"
            )
        row, grid = tuple(features.shape[:1]), tuple(features.shape[:2])
        for name, dtype, shape, axes in (
            ("mask", torch.bool, grid, "(batch tokens)"),
            ("patches", torch.int64, grid, "(batch tokens)"),
            ("sizes", torch.float32, grid, "(batch tokens)"),
            ("protected", torch.bool, grid, "(batch tokens)"),
            ("ids", torch.int64, row, "(batch)"),
        ):
            tensor: Tensor | Maker = self.given_ids if name == "ids" else getattr(self, name)
            if not isinstance(tensor, Tensor):
                continue
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ShapeError(
                    f"{name} must be {dtype} with axes {axes} = {shape}, "
                    f"got {tensor.dtype} {tuple(tensor.shape)}"
                )
            if tensor.device != features.device:
                raise ShapeError(
                    f"{name} must be on {features.device} like the features, got {tensor.device}"
                )

    @classmethod
    def of(
        cls,
        features: Tensor,
        *,
        mask: Tensor | None = None,
        patches: Tensor | None = None,
        sizes: Tensor | None = None,
        protected: Tensor | None = None,
        ids: Tensor | Maker | None = None,
        lengths: tuple[int, ...] | None = None,
    ) -> VisualTokens:
        """Visual tokens from `(batch, tokens, channels)` features; see the class for the rest.

        Whoever has a mask and knows how many tokens are real in each row says so in `lengths`,
        which saves a host sync.
        """
        if features.ndim != 3:
            raise ShapeError(
                f"features must have axes (batch tokens channels), got {tuple(features.shape)}"
            )
        batch, count = features.shape[:2]
        device = features.device
        ones = torch.ones(batch, count, dtype=torch.bool, device=device)
        tokens = cls(
            features,
            ones if mask is None else mask,
            torch.arange(count, device=device).expand(batch, count) if patches is None else patches,
            ones.to(torch.float32) if sizes is None else sizes,
            ~ones if protected is None else protected,
            torch.zeros(batch, dtype=torch.int64, device=device) if ids is None else ids,
        )
        # What is known without asking the device is noted, so that nobody has to ask.
        if mask is None:
            lengths = (count,) * batch
        if lengths is not None:
            tokens.__dict__["lengths"] = lengths
        if protected is None:
            tokens.__dict__["protected_lengths"] = (0,) * batch
        return tokens

    @property
    def given_ids(self) -> Tensor | Maker:
        """`ids` to hand on: what makes them, where nobody has read them yet."""
        given: Tensor | Maker = vars(self)["_ids"]
        return given

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Real tokens per row. One host sync, unless no mask was given."""
        return tuple(self.mask.sum(1).tolist())

    @cached_property
    def protected_lengths(self) -> tuple[int, ...]:
        """Protected real tokens per row. One host sync, unless none were given."""
        return tuple((self.protected & self.mask).sum(1).tolist())

    def reduce(self, plan: Plan) -> VisualTokens:
        """These tokens put through `plan`: features mixed, sizes summed, the rest taken."""
        members, kept = plan.members, plan.anchors.shape[1]
        sizes = plan(self.sizes) if members is None else members.sizes(self.sizes, kept)
        reduced = VisualTokens(
            plan(self.features),
            plan.mask,
            plan(self.patches),
            sizes,
            plan(self.protected),
            self.given_ids,
        )
        reduced.__dict__["lengths"] = plan.lengths
        if not any(self.protected_lengths):
            reduced.__dict__["protected_lengths"] = self.protected_lengths
        return reduced
