"""Damaged pictures, the same every time."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterator

from PIL import Image, features

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "AVIF")


def written() -> tuple[str, ...]:
    """The formats that the installed Pillow can write."""
    return tuple(each for each in FORMATS if each != "AVIF" or features.check("avif"))


def whole(kind: str) -> bytes:
    """A small picture in a format."""
    made = Image.effect_noise((24, 20), 80).convert("RGB")
    held = io.BytesIO()
    made.save(held, kind)
    return held.getvalue()


def damaged(kind: str, count: int) -> Iterator[bytes]:
    """Variants of a picture: cut off, bits turned, numbers blown up, parts doubled or gone."""
    good, draw = whole(kind), random.Random(f"damage to {kind}")
    for number in range(count):
        data = bytearray(good)
        match number % 5:
            case 0:
                data = data[: draw.randrange(len(data))]
            case 1:
                for _ in range(draw.randint(1, 9)):
                    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            case 2:
                place = draw.randrange(min(64, len(data) - 4))
                data[place : place + 4] = bytes(draw.randrange(256) for _ in range(4))
            case 3:
                place = draw.randrange(len(data))
                data[place:place] = data[: draw.randrange(40)]
            case 4:
                start = draw.randrange(len(data))
                data[start : start + draw.randint(1, 60)] = b""
        yield bytes(data)


def huge() -> bytes:
    """A PNG of a few bytes that claims 20,000 x 20,000 pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        check = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 60)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def broken_chunk() -> bytes:
    """A PNG whose data does not fit its checksum."""
    data = bytearray(whole("PNG"))
    data[data.index(b"IDAT") + 8] ^= 0xFF
    return bytes(data)
