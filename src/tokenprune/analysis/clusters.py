"""Colours, outlines and numbers for patches that were merged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from PIL import ImageDraw, ImageFont

from .canvas import Colour, Grid
from .fate import DROPPED, Fate, Slots

# Okabe and Ito's palette without black: colour-blind people can tell its colours apart.
_HUES: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)


def _mixed(colour: Colour, other: int, part: float) -> Colour:
    red, green, blue = (round(value + part * (other - value)) for value in colour)
    return red, green, blue


PALETTE: tuple[Colour, ...] = (
    *_HUES,
    *(_mixed(hue, 255, 0.55) for hue in _HUES),
    *(_mixed(hue, 0, 0.45) for hue in _HUES),
)
"""Seven hues, then lighter, then darker ones: where groups are many, lightness tells as well."""


def colours(fate: Fate, grid: Grid) -> dict[int, Colour]:
    """A colour for each group of merged patches.

    As many different ones as there are; where groups are more, those that touch still differ.
    """
    touching: dict[int, set[int]] = {group: set() for group in fate.groups}
    for crop in fate.crops:
        for one, other in _neighbours(grid):
            a, b = crop[one], crop[other]
            if a != b and a in touching and b in touching:
                touching[a].add(b)
                touching[b].add(a)
    given: dict[int, int] = {}
    used: Counter[int] = Counter()
    for group, near in touching.items():
        taken = {given[other] for other in near if other in given}
        free = [place for place in range(len(PALETTE)) if place not in taken]
        best = min(free or range(len(PALETTE)), key=lambda place: (used[place], place))
        given[group] = best
        used[best] += 1
    return {group: PALETTE[place] for group, place in given.items()}


def _neighbours(grid: Grid) -> Iterator[tuple[int, int]]:
    """Pairs of patches that share a side or a corner."""
    high, wide = grid
    for row in range(high):
        for column in range(wide):
            for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
                if row + down < high and 0 <= column + right < wide:
                    yield row * wide + column, (row + down) * wide + column + right


def outline(pen: ImageDraw.ImageDraw, slots: Slots, grid: Grid, patch: int) -> None:
    """Draw where one group ends and another begins, and where what is kept ends.

    Lines lie on merged and on discarded patches, never on one that was kept as it is.

    Args:
        pen: pen of the picture.
        slots: slots of the crop.
        grid: patches in height and width.
        patch: pixels a side of a patch.
    """
    high, wide = grid
    counts = Counter(slots)
    thick = max(1, patch // 24)
    for number, slot in enumerate(slots):
        if slot is None or (slot != DROPPED and counts[slot] == 1):
            continue
        row, column = divmod(number, wide)
        left, top = column * patch, row * patch
        right, bottom = left + patch - 1, top + patch - 1
        inner = thick - 1
        for down, across, box in (
            (-1, 0, (left, top, right, top + inner)),
            (1, 0, (left, bottom - inner, right, bottom)),
            (0, -1, (left, top, left + inner, bottom)),
            (0, 1, (right - inner, top, right, bottom)),
        ):
            if not (0 <= row + down < high and 0 <= column + across < wide):
                continue
            other = slots[(row + down) * wide + column + across]
            if other in (slot, None) or (slot != DROPPED and other == DROPPED):
                continue
            pen.rectangle(box, fill=(235, 235, 235) if slot == DROPPED else (0, 0, 0))


def label(
    pen: ImageDraw.ImageDraw, slots: Slots, groups: Mapping[int, int], grid: Grid, patch: int
) -> None:
    """Write the number of every group once on each of its connected parts."""
    size = max(9, min(patch * 2 // 5, 20))
    font = ImageFont.load_default(size)
    for part in _parts(slots, groups, grid):
        high = sum(n // grid[1] for n in part) / len(part)
        wide = sum(n % grid[1] for n in part) / len(part)
        home = min(part, key=lambda n: abs(n // grid[1] - high) + abs(n % grid[1] - wide))
        row, column = divmod(home, grid[1])
        middle = ((column + 0.5) * patch, (row + 0.5) * patch)
        name = str(groups[slots[home] or 0])
        pen.text(middle, name, (255, 255, 255), font, "mm", stroke_width=2, stroke_fill=(0, 0, 0))


def _parts(slots: Slots, groups: Mapping[int, int], grid: Grid) -> Iterator[Sequence[int]]:
    """Patches of one group that hang together by their sides."""
    high, wide = grid
    left = {number for number, slot in enumerate(slots) if slot in groups}
    while left:
        part = [min(left)]
        left.remove(part[0])
        for number in part:  # grows while it is read
            row, column = divmod(number, wide)
            for down, across in ((0, 1), (1, 0), (0, -1), (-1, 0)):
                y, x = row + down, column + across
                near = y * wide + x
                inside = 0 <= y < high and 0 <= x < wide
                if inside and near in left and slots[near] == slots[number]:
                    left.remove(near)
                    part.append(near)
        yield part
