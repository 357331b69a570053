"""Rows of visual tokens: which patches of which crops share one budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenprune.kept_patches import Origin
from tokenprune.signals import Signals
from tokenprune.tokens import VisualTokens


@dataclass(frozen=True, eq=False)
class Rows:
    """A padded arrangement of the patches of all crops.

    Attributes:
        index: `(rows, slots)` int64 into crops times patches; 0 where padded.
        mask: `(rows, slots)` bool, False where padded; None where each row is a whole crop.
        patches_per_crop: number of patches of a crop.
        origins: picture, video, crop or frame that each row shows; none where each is a picture.
    """

    index: Tensor
    mask: Tensor | None
    patches_per_crop: int
    origins: tuple[Origin, ...] = ()

    @classmethod
    def of_crops(cls, features: Tensor) -> Rows:
        """Every crop of `(crops, patches, channels)` features is a row."""
        crops, patches = features.shape[:2]
        index = torch.arange(crops * patches, device=features.device)
        return cls(index.reshape(crops, patches), None, patches)

    @classmethod
    def of(cls, numbers: list[Tensor], patches_per_crop: int, origins: Sequence[Origin]) -> Rows:
        """One row for each `(patches,)` int64, counted over all crops, and its origin."""
        index = pad_sequence(numbers, batch_first=True)
        lengths = torch.tensor([len(each) for each in numbers], device=index.device)
        mask = torch.arange(index.shape[1], device=index.device) < lengths[:, None]
        return cls(index, mask, patches_per_crop, tuple(origins))

    def to(self, device: torch.device) -> Rows:
        """The same on another device."""
        mask = None if self.mask is None else self.mask.to(device)
        return Rows(self.index.to(device), mask, self.patches_per_crop, self.origins)

    def tokens(self, features: Tensor, ids: Tensor) -> VisualTokens:
        """The patches of `(crops, patches, channels)` features, in rows.

        Positions say which patch of a row's first crop or of a later one each token is: crop times
        patches plus patch, counted within the row.

        Args:
            features: what the vision tower gave.
            ids: `(crops,)` which picture each crop shows; a row takes that of its first crop.
        """
        first = self.index[:, 0] // self.patches_per_crop
        ids = ids.to(features.device)[first]
        if self.mask is None:
            return VisualTokens.of(features, ids=ids)
        patches = self.index - first[:, None] * self.patches_per_crop
        return VisualTokens.of(
            self.take(features),
            mask=self.mask,
            patches=patches.masked_fill(~self.mask, 0),
            ids=ids,
        )

    def take(self, x: Tensor) -> Tensor:
        """`(crops, patches, ...)` to `(rows, slots, ...)`, zero where padded."""
        if self.mask is None:
            return x
        taken = x.flatten(0, 1).index_select(0, self.index.flatten())
        taken = taken.reshape(*self.index.shape, *x.shape[2:])
        return taken.masked_fill(~self.mask.reshape(*self.mask.shape, *(1,) * (x.ndim - 2)), 0)

    def signals(self, signals: Signals) -> Signals:
        """Signals of crops as signals of rows; those without an axis of tokens are left out."""
        if self.mask is None:
            return signals
        answers = {}
        for signal, answer in signals.items():
            names = signal.axes.split()
            if "tokens" in names:
                front = ["batch", "tokens", *(n for n in names if n not in ("batch", "tokens"))]
                there = f"{signal.axes} -> {' '.join(front)}"
                back = f"{' '.join(front)} -> {signal.axes}"
                answers[signal] = rearrange(self.take(rearrange(answer, there)), back)
        return Signals(answers)
