"""Pieces that every page is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .markup import Html, join, tag


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        anchor: its name in links.
        title: its heading.
        content: what stands under it.
    """

    anchor: str
    title: str
    content: Html

    def __str__(self) -> str:
        heading = tag("h2", self.title, id=f"{self.anchor}-title")
        return tag(
            "section",
            heading,
            self.content,
            id=self.anchor,
            aria_labelledby=f"{self.anchor}-title",
        )


def table(caption: str, headings: Sequence[str], rows: Iterable[Html], note: str = "") -> Html:
    """A table that scrolls by itself where a screen is narrow.

    Args:
        caption: says what is in it.
        headings: headings of the columns; one that ends with "<" is that of words, not of numbers.
        rows: made by `row`.
        note: stands below it.
    """
    head = tag("tr", *(_heading(heading) for heading in headings))
    body = tag("tbody", join(list(rows), "\n"))
    whole = tag("table", tag("caption", tag("span", caption)), tag("thead", head), body)
    scroll = tag("div", whole, class_="scroll", role="region", tabindex="0", aria_label=caption)
    return join([scroll, tag("p", note, class_="note")] if note else [scroll])


def _heading(text: str) -> Html:
    words = text.endswith("<")
    return tag("th", text.rstrip("<"), scope="col", class_="left" if words else None)


def row(first: str, *cells: str, kind: str = "") -> Html:
    """A row; its first cell heads it. A cell that is a `<td>` already is taken as it is."""
    made = (
        cell if isinstance(cell, Html) and cell.startswith("<td") else tag("td", cell)
        for cell in cells
    )
    return tag("tr", tag("th", first, scope="row"), *made, class_=kind or None)


def bar(text: str, share: float, *more: str) -> Html:
    """A cell with a bar behind its text, `share` of it wide."""
    part = min(max(share, 0.0), 1.0) if share == share else 0.0
    return tag("td", text, *more, class_="bar", style=f"--part:{100 * part:.1f}%")


def facts(pairs: Iterable[tuple[str, str]]) -> Html:
    """Names and values."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs))
