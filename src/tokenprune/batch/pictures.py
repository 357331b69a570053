"""A picture from what a row holds: a file, its bytes, pixels, or a cell of a parquet file."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from ..pictures import PictureError as Unreadable
from ..pictures import Source, read_picture
from .cells import cell, is_cell
from .errors import PictureError


def picture_of(value: object, root: str = "") -> Image.Image:
    """The picture that `value` stands for, in RGB, upright (see `tokenprune.pictures`).

    Args:
        value: name of a file, or of a cell (``"shard.parquet#17"``); an encoded file's bytes; a
            mapping with `bytes` or `path`, as Hugging Face datasets store pictures; uint8 pixels
            `(height, width)` or `(height, width, 3 or 4)`; or a Pillow image.
        root: folder that relative names are relative to.

    Raises:
        PictureError: there is no such picture, or it cannot be read.
    """
    if isinstance(value, str | Path):
        return _named(str(value), root)
    if isinstance(value, Mapping):
        inside = value.get("bytes")
        return picture_of(value.get("path") if inside is None else inside, root)
    if isinstance(value, bytes | bytearray | memoryview):
        return _decoded(io.BytesIO(value), "its bytes")
    if isinstance(value, np.ndarray) and _are_pixels(value):
        return _decoded(Image.fromarray(value), "its pixels")
    if isinstance(value, Image.Image):
        return _decoded(value, "its pixels")
    if value is None:
        raise PictureError("the row has no picture")
    got = type(value).__name__
    if isinstance(value, np.ndarray):
        got = f"{value.dtype} of shape {value.shape}"
    raise PictureError(
        f"a picture must be the name of a file, bytes or uint8 pixels (height, width) or "
        f"(height, width, 3 or 4), got {got}"
    )


def _are_pixels(value: np.ndarray) -> bool:
    shaped = value.ndim == 2 or (value.ndim == 3 and value.shape[2] in (3, 4))
    return shaped and value.dtype == np.uint8


def _named(name: str, root: str) -> Image.Image:
    place = str(Path(root, name).expanduser())
    if is_cell(name):
        held = cell(place)
        if isinstance(held, str) and is_cell(held):
            raise PictureError(f"{name} holds the name of another cell, {held}")
        return picture_of(held, root)
    return _decoded(place, name)


def _decoded(source: Source, shown: str) -> Image.Image:
    try:
        return read_picture(source, shown)
    except Unreadable as error:
        raise PictureError(f"cannot read a picture from {shown}: {error.reason}") from error
