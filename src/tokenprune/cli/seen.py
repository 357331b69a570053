"""What a model saw of a picture, and drawings on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from einops import rearrange
from PIL import Image
from torch import Tensor

from ..analysis.canvas import Grid, enlarged, laid_out, picture_of, times
from ..analysis.fate import DROPPED, Fate
from ..analysis.heat import heat_crops
from ..analysis.overlay import draw_fate
from ..errors import UnsupportedError
from ..kept_patches import Kept
from ..loading import Loaded
from ..strategy import Reduction


@dataclass(frozen=True)
class Seen:
    """Picture as a model saw it, crop by crop.

    Attributes:
        crops: the picture; or its crops, in the order of their tokens.
        grid: visual tokens in height and width of a crop. Where a model merges patches into a
            token, such a square is what is drawn.
        tiles: tiles in height and width behind a base view; None for a picture that is not cut, or
            whose tiles are drawn in their order.
    """

    crops: tuple[Image.Image, ...]
    grid: Grid
    tiles: Grid | None

    @classmethod
    def of(cls, loaded: Loaded, inputs: Mapping[str, Tensor]) -> Seen:
        """From what the processor made of one picture.

        Args:
            loaded: whose processor made `inputs`.
            inputs: `input_ids`, and `pixel_values` `(crops, 3, height, width)` or `(1, crops, 3,
                height, width)`; or, with `image_grid_thw`, patches in a row.

        Raises:
            UnsupportedError: other axes, or a number of visual tokens that makes no grid.
        """
        crops, looks = _crops(loaded, inputs), loaded.processor.image_processor
        tiles = None
        if "image_sizes" in inputs and hasattr(loaded.model.config, "image_grid_pinpoints"):
            tiles = loaded.tiles(inputs["image_sizes"][0])
            crops = crops[: 1 + tiles[0] * tiles[1]]  # what follows is padding
        grid = loaded.grid(crops)
        counts = loaded.placeholders(inputs["input_ids"])
        if tiles is None and counts is not None:
            grid = _merged(grid, sum(counts), len(crops))
        seen = tuple(picture_of(each, looks.image_mean, looks.image_std) for each in crops)
        return cls(seen, grid, tiles)

    @property
    def patches(self) -> int:
        """Visual tokens of a crop."""
        return self.grid[0] * self.grid[1]

    def scale(self, least: int) -> int:
        """By how much to enlarge, so that what is drawn is at least that large."""
        whole = self.plain(1)
        return times(whole, least)

    def plain(self, scale: int) -> Image.Image:
        """As it is."""
        crops = [enlarged(crop, scale) for crop in self.crops]
        return laid_out(crops, self.tiles, gap=6 * scale)

    def reduced(self, reduction: Reduction, scale: int) -> Image.Image:
        """With discarded patches dark and merged ones in the colour of their group."""
        return draw_fate(self.crops, self.fate(reduction), self.grid, self.tiles, scale)

    def kept(self, kept: Sequence[Kept], scale: int) -> Image.Image:
        """With all but the kept patches dark; of one picture, or of each of its tiles."""
        pairs = [
            (number + crop, patch)
            for number, each in enumerate(kept)
            for crop, patch in zip(each.crop, each.patch, strict=True)
        ]
        numbers = {crop * self.patches + patch: n for n, (crop, patch) in enumerate(pairs)}
        slots = [numbers.get(n, DROPPED) for n in range(self.patches * len(self.crops))]
        fate = Fate(tuple(tuple(slots[start : start + self.patches]) for start in self._starts))
        return draw_fate(self.crops, fate, self.grid, self.tiles, scale)

    def heat(self, scores: Tensor, reduction: Reduction, scale: int) -> Image.Image:
        """Scores of a reduction's visual tokens, `(batch, tokens)`, as colours with a scale."""
        fate = self.fate(reduction)
        values = [math.nan] * (self.patches * len(self.crops))
        rows = self._rows(reduction)
        assert reduction.patches is not None
        for number, row in enumerate(rows):
            pairs = zip(reduction.patches[row].tolist(), scores[row].tolist(), strict=True)
            for shown, score in pairs:
                where = number * self.patches + shown
                crop, patch = divmod(where, self.patches)
                if shown >= 0 and fate.crops[crop][patch] is not None:
                    values[where] = score
        of_crops = [values[start : start + self.patches] for start in self._starts]
        return heat_crops(self.crops, of_crops, self.grid, self.tiles, scale)

    def fate(self, reduction: Reduction) -> Fate:
        """What became of every patch."""
        rows, crops = self._rows(reduction), len(self.crops)
        return Fate.of(reduction.plan, reduction.patches, rows, crops, self.patches)

    @property
    def _starts(self) -> range:
        return range(0, self.patches * len(self.crops), self.patches)

    def _rows(self, reduction: Reduction) -> Sequence[int]:
        """One row for the picture; one for each crop where budgets are per crop."""
        return range(reduction.plan.anchors.shape[0])


def _crops(loaded: Loaded, inputs: Mapping[str, Tensor]) -> Tensor:
    """`(crops, 3, height, width)` pixels of one picture."""
    pixels: Any = inputs.get("pixel_values", inputs.get("pixel_values_images"))
    if "image_grid_thw" in inputs:
        ((_, high, wide),) = inputs["image_grid_thw"].tolist()
        looks = loaded.processor.image_processor
        whole: Tensor = rearrange(
            pixels,
            "(h w down across) (c time high wide) -> time c (h down high) (w across wide)",
            h=high // looks.merge_size,
            w=wide // looks.merge_size,
            down=looks.merge_size,
            across=looks.merge_size,
            c=3,
            high=looks.patch_size,
            wide=looks.patch_size,
        )
        return whole[:1]  # a picture is shown as a film in which nothing moves
    axes = None if pixels is None else tuple(pixels.shape)
    if axes is None or len(axes) not in (4, 5) or axes[-3] != 3 or (len(axes) == 5 and axes[0] > 1):
        raise UnsupportedError(
            "an overlay needs pixel_values of one picture with axes (crops 3 height width) or "
            f"(1 crops 3 height width), or image_grid_thw beside patches in a row, got {axes}"
        )
    crops: Tensor = pixels.flatten(0, -4)
    return crops


def _merged(grid: Grid, tokens: int, crops: int) -> Grid:
    """Tokens in height and width of a crop, where squares of patches become one."""
    high, wide = grid
    square = high * wide * crops // max(tokens, 1)
    side = math.isqrt(square)
    if not side or (high // side) * (wide // side) * crops != tokens:
        raise UnsupportedError(
            f"an overlay needs tokens that are squares of patches, got {tokens} visual tokens of "
            f"{crops} crops with {high} x {wide} patches"
        )
    return high // side, wide // side
