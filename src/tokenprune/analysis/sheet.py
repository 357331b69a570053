"""Pictures beside each other, with titles and captions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from .canvas import INK, PAPER, Colour

_TITLE = 15
_CAPTION = 13
_HEADING = 17
_FADED: Colour = (95, 95, 100)


@dataclass(frozen=True)
class Panel:
    """One picture of a sheet.

    Attributes:
        picture: what is shown.
        title: stands above it.
        caption: stands below it.
    """

    picture: Image.Image
    title: str
    caption: str = ""


def sheet(
    panels: Sequence[Panel], heading: str = "", columns: int = 0, gap: int = 14
) -> Image.Image:
    """Panels in rows, text above and below each in as many lines as it takes.

    Args:
        panels: at least one.
        heading: stands above all.
        columns: panels in a row; 0 for what gives a sheet about as wide as it is practical.
        gap: pixels between panels.
    """
    if not panels:
        raise ValueError("a sheet needs at least one panel")
    wide, high = (max(getattr(p.picture, side) for p in panels) for side in ("width", "height"))
    columns = min(len(panels), columns or _columns(len(panels), wide + gap))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    width = gap + columns * (wide + gap)
    head = _Text(heading, _HEADING, width - 2 * gap)
    titles = [[_Text(panel.title, _TITLE, wide) for panel in row] for row in rows]
    captions = [[_Text(panel.caption, _CAPTION, wide) for panel in row] for row in rows]
    heads, feet = (
        [max(text.height for text in row) for row in each] for each in (titles, captions)
    )
    top = gap + (head.height + gap if heading else 0)
    whole = Image.new(
        "RGB", (width, top + sum(heads) + sum(feet) + len(rows) * (high + gap)), PAPER
    )
    pen = ImageDraw.Draw(whole)
    head.write(pen, gap, gap, INK)
    for row, title, caption, above, below in zip(rows, titles, captions, heads, feet, strict=True):
        for place, panel in enumerate(row):
            left = gap + place * (wide + gap)
            title[place].write(pen, left, top + above - title[place].height, INK)
            whole.paste(panel.picture, (left, top + above))
            under = top + above + panel.picture.height
            caption[place].write(pen, left, under, _FADED)
        top += above + high + below + gap
    return whole


def stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets below each other."""
    size = max(one.width for one in sheets), sum(one.height for one in sheets)
    whole, top = Image.new("RGB", size, PAPER), 0
    for one in sheets:
        whole.paste(one, (0, top))
        top += one.height
    return whole


def side_by_side(pictures: Mapping[str, Image.Image], gap: int = 12) -> Image.Image:
    """Pictures in a row, each with its title above it."""
    panels = [Panel(picture, title) for title, picture in pictures.items()]
    return sheet(panels, columns=len(panels), gap=gap)


def _columns(count: int, each: int, most: int = 1500) -> int:
    """As few rows as fit, filled evenly."""
    rows = math.ceil(count / max(1, most // each))
    return math.ceil(count / rows)


class _Text:
    """Lines of one size that fit a width."""

    def __init__(self, text: str, size: int, width: int) -> None:
        self.font = ImageFont.load_default(size)
        self.lines = list(_wrapped(text, self.font, width)) if text else []
        self.step = round(size * 1.35)
        self.height = self.step * len(self.lines) + (6 if text else 0)

    def write(self, pen: ImageDraw.ImageDraw, left: int, top: int, colour: Colour) -> None:
        for number, line in enumerate(self.lines):
            pen.text((left, top + 2 + number * self.step), line, colour, self.font)


def _wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> Iterator[str]:
    """Break between words; within a word that is too long by itself."""
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if font.getlength(longer) <= width:
                line = longer
                continue
            if line:
                yield line
            line = word
            while font.getlength(line) > width and len(line) > 1:
                fits = next(
                    n
                    for n in range(len(line) - 1, 0, -1)
                    if n == 1 or font.getlength(line[:n]) <= width
                )
                yield line[:fits]
                line = line[fits:]
        yield line
