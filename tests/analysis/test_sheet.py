"""Panels beside each other; pixels are read with Pillow."""

from __future__ import annotations

import pytest
from PIL import Image

from tokenprune.analysis.sheet import Panel, sheet, stacked

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def box_of(drawn: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what has exactly this colour."""
    same = Image.new("1", drawn.size)
    same.putdata([pixel == colour for pixel in drawn.get_flattened_data()])
    return same.getbbox()


def panels(*texts: tuple[str, str]) -> list[Panel]:
    colours = (RED, BLUE, (0, 200, 0), (200, 200, 0))
    return [
        Panel(Image.new("RGB", (120, 80), colour), *text)
        for colour, text in zip(colours, texts, strict=False)
    ]


def test_panels_stand_on_one_line_whatever_their_titles() -> None:
    drawn = sheet(panels(("short", ""), ("a title of so many words that it takes lines", "")))
    left, top, right, bottom = box_of(drawn, RED)
    assert (right - left, bottom - top) == (120, 80)
    assert box_of(drawn, BLUE)[1::2] == (top, bottom)
    # The short title stands on its picture, not at the height of the other's first line.
    assert drawn.crop((left, top - 20, right, top)).convert("L").getextrema()[0] < 128
    assert drawn.crop((left, 0, right, top - 26)).convert("L").getextrema()[0] > 250


def test_text_stays_beside_pictures_and_in_its_column() -> None:
    long = "supercalifragilistic(expialidocious=0.123456789)|evict(14)@after-layer(2)"
    drawn = sheet(panels((long, long), ("", "")), gap=10)
    left, top, right, bottom = box_of(drawn, RED)
    column = drawn.crop((right, 0, right + 10, drawn.height))
    assert column.getcolors() == [(10 * drawn.height, WHITE)]
    for part in ((left, 0, right, top), (left, bottom, right, drawn.height)):
        assert drawn.crop(part).convert("L").getextrema()[0] < 128
    under_blue = drawn.crop((box_of(drawn, BLUE)[0], bottom, drawn.width, drawn.height))
    assert len(under_blue.getcolors()) == 1


def test_rows_of_columns_and_a_heading() -> None:
    four = panels(*[("t", "c")] * 4)
    plain, headed = sheet(four, columns=2), sheet(four, "heading", columns=2)
    assert box_of(plain, RED)[0] == box_of(plain, (0, 200, 0))[0] < box_of(plain, BLUE)[0]
    assert box_of(headed, RED)[1] > box_of(plain, RED)[1]


def test_stacked() -> None:
    wide, high = Image.new("RGB", (9, 2), RED), Image.new("RGB", (3, 5), BLUE)
    whole = stacked([wide, high])
    assert whole.size == (9, 7)
    assert box_of(whole, RED) == (0, 0, 9, 2)
    assert box_of(whole, BLUE) == (0, 2, 3, 7)


def test_no_panels_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one panel"):
        sheet([])
