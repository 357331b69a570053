"""Average pooling on the grid: merging that looks at nothing, the second honest floor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..budget import Budgeted
from ..errors import SpecError
from ..plan import Plan
from ..signals import Signals
from ..strategy import Reducer
from ..tokens import VisualTokens
from .kept_counts import Free, column, kept_counts, minus


@dataclass(frozen=True)
class Pool(Budgeted, Reducer):
    """Average neighbouring patches into `keep` cells, whatever the picture shows.

    The grid is cut into bands of rows and each band into cells, as evenly as whole patches allow:
    144 of 24 x 24 patches is plain 2 x 2 pooling, and any other budget is met exactly. Tokens that
    do not fill a grid (an earlier reducer took some, or a newline stands between) are pooled in
    runs along the raster instead. Protected tokens take no part and count towards the budget;
    where they fill it, the other tokens are dropped.

    Args:
        keep: tokens that stay per row: int = count, float = fraction.
        per: what the budget is for (see `Keep`).
        grid: rows and columns of the patches of an image that is not square.
    """

    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid is None:
            return
        grid = tuple(self.grid) if isinstance(self.grid, (tuple, list)) else ()
        if len(grid) != 2 or any(isinstance(n, bool) or not isinstance(n, int) for n in grid):
            raise SpecError(f"grid must be (rows, columns), got {self.grid!r}")
        if min(grid) < 1:
            raise SpecError(f"grid must have at least one row and column, got {self.grid!r}")
        object.__setattr__(self, "grid", grid)

    @property
    def ignores_scores(self) -> bool:
        return True

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        counts = kept_counts(self.budget, tokens)
        if counts == tokens.lengths:
            return Plan.identity(tokens.mask, tokens.lengths)
        free = Free.of(tokens)
        cells = minus(counts, tokens.protected_lengths)
        place = (free.mask.cumsum(1) - 1).clamp(min=0)
        grids = [self._grid(length) for length in free.lengths]
        on_grid = _cell(place, grids, cells)
        runs = _cell(place, [(1, max(length, 1)) for length in free.lengths], cells)
        cell = torch.where(_unbroken(tokens, free), on_grid, runs)
        # Cells and protected tokens share one numbering of groups: that of the first member.
        slots = tokens.mask.shape[1]
        here = torch.arange(slots, device=cell.device).expand_as(cell)
        first = torch.full_like(here, slots)
        first.scatter_reduce_(1, cell, torch.where(free.mask, here, slots), "amin")
        groups = torch.where(free.mask, first.gather(1, cell), here)
        dropped = free.mask & (column(cells, cell.device) == 0)
        return Plan.group(groups.masked_fill(dropped | ~tokens.mask, -1), tokens.sizes, counts)

    def _grid(self, length: int) -> tuple[int, int]:
        """Rows and columns of `length` tokens: a square, or one row where they fill no grid."""
        if self.grid is not None and math.prod(self.grid) == length:
            return self.grid
        side = math.isqrt(length)
        return (side, side) if side * side == length > 0 else (1, max(length, 1))


def _unbroken(tokens: VisualTokens, free: Free) -> Tensor:
    """`(batch, 1)` bool: whether the free tokens of a row are successive patches."""
    far = torch.iinfo(torch.int64).max
    low = tokens.patches.masked_fill(~free.mask, far).amin(1)
    high = tokens.patches.masked_fill(~free.mask, -1).amax(1)
    return (high - low + 1 == column(free.lengths, low.device)[:, 0])[:, None]


def _cell(place: Tensor, grids: list[tuple[int, int]], cells: list[int]) -> Tensor:
    """`(batch, tokens)` int64 in [0, cells): the cell of the token at each place of the raster.

    Bands differ by at most one row, and the cells of all bands by at most one in number.
    """
    bands = []
    for (rows, columns), cell_count in zip(grids, cells, strict=True):
        even = math.floor(math.sqrt(cell_count * rows / columns) + 0.5)
        fewest = -(-cell_count // columns)  # no band has more cells than columns
        bands.append(max(min(max(even, fewest), rows, cell_count), 1))
    height = column([rows for rows, _ in grids], place.device)
    width = column([columns for _, columns in grids], place.device)
    count, wanted = column(bands, place.device), column(cells, place.device)
    y = _share(place, 1, width).minimum(height - 1)
    band = _share(y, count, height)
    # Rounded up as the first rows of bands are, so that the bands with a row more come first in
    # both, and get the cells that do not divide evenly.
    start = -_share(-band, wanted, count)
    inside = _share(place - y * width, -_share(-band - 1, wanted, count) - start, width)
    return (start + inside).clamp(min=0, max=place.shape[1] - 1)


def _share(number: Tensor, parts: Tensor | int, whole: Tensor) -> Tensor:
    """`number` * `parts` / `whole`, rounded down."""
    share: Tensor = (number * parts).div(whole, rounding_mode="floor")
    return share
