"""Drawing of objects over noise, in sums that are exact: every machine gets the same pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Split: TypeAlias = Literal["test", "train"]
Floats: TypeAlias = NDArray[np.float32]

SIDE = 64
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 175, 60),
    "blue": (50, 70, 225),
    "yellow": (230, 210, 40),
    "magenta": (200, 50, 200),
    "cyan": (40, 200, 210),
}
DIGITS = ("one", "three", "four", "six")
KINDS = ("circle", "square", "triangle", "star", "cross", "ring", *DIGITS)
CLUTTER = ("diamond", "bar", "post")
TEXTURES = ("plain", "striped", "lined", "checked")
PLATE = "plate"

_FINE = 4  # sub-pixels a side when a shape's coverage is sampled


@dataclass(frozen=True)
class Stroke:
    """Stroke: one thing to paint.

    Attributes:
        kind: a name of `KINDS` or `CLUTTER`, or `PLATE`.
        rgb: its colour, 0 to 255.
        box: (left, top, right, bottom) in pixels, right and bottom exclusive; a square for all but
            a plate.
        variant: which handwriting, for digits; other kinds ignore it.
    """

    kind: str
    rgb: tuple[int, int, int]
    box: tuple[int, int, int, int]
    variant: int = 0


def paint(
    strokes: Sequence[Stroke], texture: str, rng: np.random.Generator, split: Split
) -> NDArray[np.uint8]:
    """Paint `strokes` in order on a noise background with a texture of `TEXTURES`.

    Returns:
        `(64, 64, 3)` uint8, red-green-blue.
    """
    canvas = _background(rng) + _texture(texture, rng)
    for stroke in strokes:
        left, top, right, bottom = stroke.box
        alpha = _alpha(stroke, split)
        region = canvas[:, top:bottom, left:right]
        region += (np.array(stroke.rgb, np.float32)[:, None, None] - region) * alpha
    canvas += rng.integers(-14, 15, canvas.shape, dtype=np.int16)
    return np.ascontiguousarray(np.clip(canvas, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def _background(rng: np.random.Generator) -> Floats:
    """`(3, 64, 64)`: a gray level, coloured clouds and a coloured grain of four pixels."""
    gray = int(rng.integers(90, 161))
    clouds = rng.integers(-44, 45, (3, 5, 5)).astype(np.float32)
    grain = rng.integers(-26, 27, (3, 17, 17)).astype(np.float32)
    coarse, fine = _stretch(5), _stretch(17)
    sum_ = coarse @ clouds @ coarse.T + fine @ grain @ fine.T
    canvas = sum_.astype(np.float32, copy=False)  # as it is; some annotations of numpy say float64
    canvas += gray
    return canvas


def _texture(name: str, rng: np.random.Generator) -> Floats:
    """`(64, 64)` of +-strength: stripes stand, lines lie, two pixels wide."""
    strength = int(rng.integers(9, 15))
    dark = (np.arange(SIDE) + int(rng.integers(4))) // 2 % 2
    still = np.zeros(SIDE, dark.dtype)
    column = dark if name in ("lined", "checked") else still
    row = dark if name in ("striped", "checked") else still
    weave: Floats = (1 - 2 * (column[:, None] ^ row)).astype(np.float32)
    weave *= strength if name != "plain" else 0
    return weave


@cache
def _stretch(nodes: int) -> Floats:
    """`(64, nodes)` weights of a linear interpolation; all are multiples of 1/16, hence exact."""
    step = SIDE // (nodes - 1)
    where = np.arange(SIDE)
    weights = np.zeros((SIDE, nodes), np.float32)
    weights[where, where // step] = 1 - (where % step) / step
    weights[where, where // step + 1] += (where % step) / step
    return weights


def _alpha(stroke: Stroke, split: Split) -> Floats:
    left, top, right, bottom = stroke.box
    size = right - left
    if stroke.kind == PLATE:
        return np.ones((bottom - top, size), np.float32)
    if stroke.kind in DIGITS:
        return _digit(stroke.kind, stroke.variant, size, split)
    return _shape(stroke.kind, size)


@cache
def _shape(kind: str, size: int) -> Floats:
    """`(size, size)` coverage of each pixel, in sixteenths."""
    axis = (2 * np.arange(size * _FINE) + 1) / (size * _FINE) - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    radius = np.hypot(x, y)
    if kind == "circle":
        inside = radius <= 1
    elif kind == "square":
        inside = np.maximum(abs(x), abs(y)) <= 0.9
    elif kind == "triangle":
        inside = 2 * abs(x) <= y + 1
    elif kind == "star":  # a pentagram is what at least four of its five sides enclose
        angles = 2 * np.pi * np.arange(5) / 5
        sides = [x * np.sin(a) - y * np.cos(a) <= np.cos(2 * np.pi / 5) for a in angles]
        inside = (np.sum(sides, axis=0) >= 4) & (radius <= 1)
    elif kind == "cross":
        inside = np.minimum(abs(x), abs(y)) <= 0.27
    elif kind == "ring":
        inside = (radius <= 1) & (radius >= 0.58)
    elif kind == "diamond":
        inside = abs(x) + abs(y) <= 1
    elif kind == "bar":
        inside = abs(y) <= 0.35
    elif kind == "post":
        inside = abs(x) <= 0.35
    else:
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(KINDS + CLUTTER)}")
    coverage: Floats = inside.reshape(size, _FINE, size, _FINE).mean((1, 3), dtype=np.float32)
    return coverage


@lru_cache(maxsize=4096)
def _digit(kind: str, variant: int, size: int, split: Split) -> Floats:
    """`(size, size)` ink of one handwritten digit, in sixteenths."""
    scans = _scans(split)[kind]
    scan = scans[variant % len(scans)].astype(np.float32)
    place = np.clip((np.arange(size) + 0.5) * 8 / size - 0.5, 0, 7)
    low = np.minimum(place.astype(int), 6)
    weights = np.zeros((size, 8), np.float32)
    part = np.round((place - low) * 16) / 16
    weights[np.arange(size), low] = 1 - part
    weights[np.arange(size), low + 1] = part
    ink: Floats = np.minimum(np.floor(2 * (weights @ scan @ weights.T)) / 16, 1)
    return ink


@cache
def _scans(split: Split) -> dict[str, NDArray[np.uint8]]:
    """For each digit `(scans, 8, 8)` uint8, 0 to 16: UCI "Optical Recognition", see NOTICE."""
    with np.load(Path(__file__).with_name("digits.npz")) as archive:
        return {digit: archive[f"{split}_{digit}"] for digit in DIGITS}
