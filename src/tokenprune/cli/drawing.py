"""Drawings on what a model saw of a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..analysis.canvas import Grid, arranged, enlarged, picture_of, times
from ..analysis.fate import DROPPED, Fate
from ..analysis.heat import heat_crops
from ..analysis.overlay import draw_fate
from ..errors import UnsupportedError
from ..kept_patches import Kept
from ..loading import Loaded
from ..strategy import Reduction
from .errors import CommandError

DESCRIPTION = "Description"
"""The field of a PNG that says in words what it shows; pages use it as alternative text."""


@dataclass(frozen=True)
class Seen:
    """Picture as a model saw it, crop by crop.

    Attributes:
        crops: the picture; or base view and tiles.
        grid: patches in height and width of a crop.
        tiles: tiles in height and width; None for a picture that is not cut.
    """

    crops: tuple[Image.Image, ...]
    grid: Grid
    tiles: Grid | None

    @classmethod
    def of(cls, loaded: Loaded, inputs: Mapping[str, Tensor]) -> Seen:
        """From what the processor made of one picture.

        Args:
            loaded: whose processor made `inputs`.
            inputs: inputs with `pixel_values` `(1, 3, height, width)`, or of several crops
                `(1, crops, 3, height, width)` with `image_sizes`.
        """
        pixels, looks = inputs["pixel_values"], loaded.processor.image_processor
        if pixels.ndim not in (4, 5) or (pixels.ndim == 5 and "image_sizes" not in inputs):
            raise UnsupportedError(
                "an overlay needs pixel_values with axes (batch 3 height width), or (batch crops 3 "
                f"height width) with image_sizes, got {tuple(pixels.shape)}"
            )
        seen = tuple(
            picture_of(each, looks.image_mean, looks.image_std)
            for each in (pixels if pixels.ndim == 4 else pixels[0])
        )
        grid = loaded.grid(pixels)
        if pixels.ndim == 4:
            return cls(seen, grid, None)
        tiles = loaded.tiles(inputs["image_sizes"][0])
        return cls(seen[: 1 + tiles[0] * tiles[1]], grid, tiles)

    @property
    def patches(self) -> int:
        """Of a crop."""
        return self.grid[0] * self.grid[1]

    def scale(self, least: int) -> int:
        """By how much to enlarge, so that what is drawn is at least that large."""
        whole = self.plain(1)
        return times(whole, least)

    def plain(self, scale: int) -> Image.Image:
        """As it is."""
        crops = [enlarged(crop, scale) for crop in self.crops]
        return crops[0] if self.tiles is None else arranged(crops, self.tiles, gap=6 * scale)

    def reduced(self, reduction: Reduction, scale: int) -> Image.Image:
        """With discarded patches dark and merged ones in the colour of their group."""
        return draw_fate(self.crops, self.fate(reduction), self.grid, self.tiles, scale)

    def kept(self, kept: Kept, scale: int) -> Image.Image:
        """With all but the kept patches dark."""
        pairs = zip(kept.crop, kept.patch, strict=True)
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


def check_writable(path: Path) -> None:
    """Refuse a file name whose ending is no picture format."""
    known = Image.registered_extensions()
    if known.get(path.suffix.lower()) not in Image.SAVE:
        raise CommandError(f"cannot write a picture to {path}; name it .png, .jpg or .webp")


def write_picture(picture: Image.Image, path: Path, description: str = "") -> None:
    """Save `picture`; its folder is made where it does not exist. A PNG keeps `description`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if description and path.suffix.lower() == ".png":
            notes = PngInfo()
            notes.add_itxt(DESCRIPTION, description)
            picture.save(path, optimize=True, pnginfo=notes)
        else:
            picture.save(path, optimize=True)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error}") from error
