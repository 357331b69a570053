"""Any-resolution images: which crop and patch every packed token is.

The model's own packing (grid, unpadding, newlines) is run on an index instead of on features, so
nothing of it is repeated here and every version is followed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .anatomy import aspect_ratio

NEWLINE = -1


@dataclass(frozen=True, eq=False)
class Packing:
    """Packing of the crops of some images into sequences of tokens.

    Attributes:
        sources: for each image `(packed,)` int64: where each packed token comes from, counted over
            the crops of all images, `crop * patches + patch`; -1 is a newline.
        crops: crops of each image, the base view first.
        patches_per_crop: number of patches of a crop.
    """

    sources: tuple[Tensor, ...]
    crops: tuple[int, ...]
    patches_per_crop: int

    @classmethod
    def of(cls, core: Any, sizes: Tensor, patches: int) -> Packing:
        """The packing of images of `(images, 2)` height and width by the model `core`."""
        crops = tuple(_crops(core, size) for size in sizes)
        index = torch.arange(sum(crops) * patches, device="cpu").reshape(-1, patches, 1)
        packed, _ = core.pack_image_features(
            list(torch.split(index, list(crops))),
            sizes,
            "default",
            torch.tensor([NEWLINE], device="cpu"),
        )
        return cls(tuple(each.squeeze(-1) for each in packed), crops, patches)

    @property
    def patches(self) -> list[Tensor]:
        """For each image `(packed,)` int64: crop of the image times patches plus patch, or -1."""
        firsts = itertools.accumulate(self.crops, initial=0)
        return [
            torch.where(source == NEWLINE, NEWLINE, source - first * self.patches_per_crop)
            for source, first in zip(self.sources, firsts)  # noqa: B905
        ]


def packed_by_grid(
    core: Any, sizes: Tensor, whole: Sequence[bool], side: int, aspect: str | None
) -> Packing:
    """The packing of a model that may shrink the grid of its tiles.

    The packing is run on rows and columns of that grid, which shrink as features do. A token that
    is made of several patches counts as the one that is nearest to its middle.

    Args:
        core: the model without its head, with `pack_image_features`.
        sizes: `(images, 2)` height and width.
        whole: for each image, whether it has no tiles.
        side: patches a side of a crop.
        aspect: how many crops the grid may hold before it shrinks, as ``"anyres_max_9"``; None for
            what is configured.
    """
    grids = [
        (0, 0) if alone else _grid(core, size) for size, alone in zip(sizes, whole, strict=True)
    ]
    packed, _ = core.pack_image_features(
        [_places(grid, side) for grid in grids],
        sizes,
        torch.full((2,), float(NEWLINE), device="cpu"),
        aspect_ratio(core.config) if aspect is None else aspect,
    )
    crops = tuple(1 + down * across for down, across in grids)
    firsts = itertools.accumulate(crops, initial=0)
    sources = [
        _sources(each, first, across, side)
        for each, first, (_, across) in zip(packed, firsts, grids)  # noqa: B905
    ]
    return Packing(tuple(sources), crops, side * side)


def _places(grid: tuple[int, int], side: int) -> Tensor:
    """`(crops, patches, 2)` row and column: of the base view, then of tiles in one large grid."""
    down, across = grid
    one = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    tiles = torch.cartesian_prod(torch.arange(down), torch.arange(across)) * side
    return torch.cat([one[None], tiles[:, None] + one]).float()


def _sources(places: Tensor, first: int, across: int, side: int) -> Tensor:
    """As `Packing.sources`, of an image whose crops begin at `first`.

    Args:
        places: `(packed, 2)` row and column of each packed token.
        first: number of the base view.
        across: tiles in width.
        side: patches a side of a crop.
    """
    row, column = places.round().long().T
    tile = row // side * across + column // side
    tile[: side * side] = -1  # the base view comes first
    patch: Tensor = (first + 1 + tile) * side * side + row % side * side + column % side
    return patch.masked_fill(places[:, 0] < 0, NEWLINE)


def _grid(core: Any, size: Tensor) -> tuple[int, int]:
    """Tiles in height and width of an image of `size`: the model's own count."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    vision = core.config.vision_config
    shape: tuple[int, int] = get_anyres_image_grid_shape(
        size, core.config.image_grid_pinpoints, vision.image_size
    )
    return shape


def _crops(core: Any, size: Tensor) -> int:
    """Crops of an image of `size` (height, width): the model's own count."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    vision = core.config.vision_config
    count: int = image_size_to_num_patches(
        size, core.config.image_grid_pinpoints, vision.image_size
    )
    return count
