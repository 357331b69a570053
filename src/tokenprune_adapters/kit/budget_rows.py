"""Budget rows: which patches of which crops share one budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenprune.gather import gather_flat, zero_fillers
from tokenprune.kept_patches import Origin
from tokenprune.on_read import Maker
from tokenprune.signals import Signals
from tokenprune.to_device import numbers_on, sent
from tokenprune.tokens import VisualTokens


@dataclass(frozen=True, eq=False)
class BudgetRows:
    """Padded arrangement of the patches of all crops in rows, each of which has one budget.

    Attributes:
        index: `(rows, slots)` int64 into crops times patches; 0 where padded.
        mask: `(rows, slots)` bool, False where padded; None where each row is a whole crop.
        patches_per_crop: number of patches of a crop.
        origins: picture, video, crop or frame that each row shows; none where each is a picture.
        beside: number of tokens in front of the patches of each crop, such as [CLS], that enter a
            projector with them: they are neither counted here nor reduced.
    """

    index: Tensor
    mask: Tensor | None
    patches_per_crop: int
    origins: tuple[Origin, ...] = ()
    beside: int = 0

    @classmethod
    def of_crops(cls, features: Tensor) -> BudgetRows:
        """Every crop of `(crops, patches, channels)` features is a row."""
        crops, patches = features.shape[:2]
        index = torch.arange(crops * patches, device=features.device)
        return cls(index.reshape(crops, patches), None, patches)

    @classmethod
    def of(
        cls,
        numbers: list[Tensor],
        patches_per_crop: int,
        origins: Sequence[Origin],
        beside: int = 0,
    ) -> BudgetRows:
        """One row for each `(patches,)` int64, counted over all crops, and its origin.

        >>> origins = [Origin(0, patches_per_crop=4), Origin(1)]
        >>> rows = BudgetRows.of([torch.arange(8), torch.arange(8, 12)], 4, origins)
        >>> rows.tokens(torch.rand(3, 4, 16), ids=torch.tensor([7, 7, 9])).lengths
        (8, 4)
        """
        index = pad_sequence(numbers, batch_first=True)
        lengths = numbers_on(index.device, [len(each) for each in numbers])
        mask = torch.arange(index.shape[1], device=index.device) < lengths[:, None]
        return cls(index, mask, patches_per_crop, tuple(origins), beside)

    def to(self, device: torch.device) -> BudgetRows:
        """The same on another device."""
        mask = None if self.mask is None else sent(self.mask, device)
        return replace(self, index=sent(self.index, device), mask=mask)

    def tokens(self, features: Tensor, ids: Tensor | Maker) -> VisualTokens:
        """Visual tokens of `(crops, patches, channels)` features, in rows.

        A patch is counted within its row: crop times patches per crop plus patch of the crop.

        Args:
            features: what the vision tower gave.
            ids: `(crops,)` int64 picture that each crop shows, or what makes it; a row takes that
                of its first crop.
        """
        first = self.index[:, 0] // self.patches_per_crop
        ids = partial(_of_rows, ids, first.to(features.device))
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
        return zero_fillers(gather_flat(x, self.index), self.mask)

    def signals(self, signals: Signals) -> Signals:
        """Signals of crops as signals of rows; those without an axis of tokens are left out."""
        return signals if self.mask is None else signals.along_tokens(self.take)


def _of_rows(ids: Tensor | Maker, first: Tensor) -> Tensor:
    made = ids if isinstance(ids, Tensor) else ids()
    return made.to(first.device)[first]
