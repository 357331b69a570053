"""Pictures are decoded, not converted: what each mode means, and what has no sure meaning."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from tokenprune import pictures
from tokenprune.batch.errors import PictureError as RowError
from tokenprune.batch.pictures import picture_of
from tokenprune.bench.data import DataError, Sample
from tokenprune.pictures import NoPictureError, PictureError, is_picture, read_picture

RAMP = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
WHITE = (255, 255, 255)


def loaders() -> list[Callable[[Path], Image.Image]]:
    """Every way in which a command opens a file."""
    return [
        read_picture,
        lambda path: Sample("s", path, "q").picture(),
        picture_of,
        lambda path: picture_of(path.read_bytes()),
        lambda path: picture_of({"bytes": path.read_bytes(), "path": None}),
        lambda path: picture_of(path.name, str(path.parent)),
        lambda path: read_picture(Image.open(path)),
        lambda path: Sample("s", Image.open(path), "q").picture(),
    ]


def file_of(image: Image.Image, kind: str, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def greys(picture: Image.Image) -> np.ndarray:
    assert picture.mode == "RGB"
    seen = np.asarray(picture).astype(int)
    assert (seen == seen[..., :1]).all()
    return seen[..., 0]


def tiff(bits: int, photometric: int, form: int, raw: bytes, width: int = 256) -> io.BytesIO:
    """A TIFF of one row, little-endian, uncompressed; `form` 1 is unsigned, 2 signed, 3 floats."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 277: 1, 278: 1, 339: form}
    start = 8 + 2 + 12 * (len(tags) + 2) + 4
    tags |= {273: start, 279: len(raw)}
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    for tag, value in sorted(tags.items()):
        head += struct.pack("<HHIHH", tag, 3, 1, value, 0)
    return io.BytesIO(head + bytes(4) + raw)


def png(depth: int, colour: int, width: int, raw: bytes, transparent: bytes = b"") -> io.BytesIO:
    """A PNG of one row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    made = b"\x89PNG\r\n\x1a\n"
    made += chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
    made += chunk(b"tRNS", transparent) if transparent else b""
    return io.BytesIO(made + chunk(b"IDAT", zlib.compress(b"\0" + raw)) + chunk(b"IEND", b""))


# -------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm", "jp2"])
@pytest.mark.parametrize("number", range(len(loaders())))
def test_sixteen_bit_grey_is_not_white(tmp_path: Path, kind: str, number: int) -> None:
    path = tmp_path / f"scan.{kind}"
    wide = Image.fromarray(RAMP.astype(np.uint16) * 257)
    if kind == "ppm":
        path.write_bytes(b"P5 256 4 65535\n" + (RAMP.astype(">u2") * 257).tobytes())
    else:
        wide.save(path)
    assert (greys(loaders()[number](path)) == RAMP).all()


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=40))
def test_sixteen_bits_are_rounded_to_eight(numbers: list[int]) -> None:
    values = np.array([numbers], np.uint16)
    wanted = np.floor(values.astype(float) / 257 + 0.5)
    for image in (
        Image.fromarray(values),
        Image.frombytes("I;16B", (len(numbers), 1), values.astype(">u2").tobytes()),
        Image.open(png(16, 0, len(numbers), values.astype(">u2").tobytes())),
        Image.open(tiff(16, 1, 1, values.astype("<u2").tobytes(), len(numbers))),
    ):
        assert (greys(read_picture(image)) == wanted).all()


def test_big_endian_tiff() -> None:
    big = Image.frombytes("I;16B", (256, 4), (RAMP.astype(">u2") * 257).tobytes())
    assert (greys(read_picture(file_of(big, "TIFF"))) == RAMP).all()


def test_twelve_bits_of_a_tiff_have_their_own_white() -> None:
    seen = read_picture(tiff(12, 1, 1, bytes([0xFF, 0xF8, 0x00]), width=2))
    assert greys(seen).tolist() == [[255, 128]]


def test_white_may_be_zero() -> None:
    """X-rays: Pillow turns 8-bit ones, and no others."""
    ramp = RAMP[0]
    for file in (
        tiff(8, 0, 1, ramp.tobytes()),
        tiff(16, 0, 1, (ramp.astype("<u2") * 257).tobytes()),
        tiff(32, 0, 3, (ramp / 255).astype("<f4").tobytes()),
    ):
        assert (greys(read_picture(file))[0] == 255 - ramp).all()


@pytest.mark.parametrize("most", [1, 100, 255, 256, 4095, 65535])
@pytest.mark.parametrize("form", ["binary", "text"])
def test_portable_grey_maps_say_what_is_white(most: int, form: str) -> None:
    numbers = [0, most // 2, most]
    head = f"{'P5' if form == 'binary' else 'P2'} 3 1 {most}\n".encode()
    data = np.array(numbers, ">u2" if most > 255 else "u1").tobytes()
    if form == "text":
        data = " ".join(map(str, numbers)).encode()
    seen = greys(read_picture(io.BytesIO(head + data)))[0]
    assert np.abs(seen - np.array(numbers) * 255 / most).max() <= 0.51


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40))
def test_floats_from_zero_to_one_are_rounded_to_eight_bits(numbers: list[float]) -> None:
    values = np.array([numbers], np.float32)
    seen = greys(read_picture(Image.fromarray(values)))
    assert np.abs(seen - values.astype(float) * 255).max() <= 0.5 + 1e-4


def test_floats_of_files(tmp_path: Path) -> None:
    for kind in ("tiff", "pfm"):
        path = tmp_path / f"a.{kind}"
        Image.fromarray((RAMP / 255).astype(np.float32)).save(path)
        assert (greys(read_picture(path)) == RAMP).all()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.0, 255.0], "its pixels are floats from 0.0 to 255.0, and only those from 0 (black) to"),
        ([-0.5, 1.0], "floats from -0.5 to 1.0"),
        ([0.5, np.nan], "floats from 0.5 to 0.5"),
        ([np.nan, 0.5], "floats from nan to nan"),
        ([0.5, np.inf], "to inf"),
    ],
)
def test_floats_without_a_sure_meaning_are_refused(
    tmp_path: Path, values: list[float], words: str
) -> None:
    path = tmp_path / "depth.tiff"
    Image.fromarray(np.array([values], np.float32)).save(path)
    with pytest.raises(PictureError) as caught:
        read_picture(path)
    assert "depth.tiff" in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("dtype", ["<i4", "<u4", "<i2"])
def test_whole_numbers_without_a_sure_meaning_are_refused(tmp_path: Path, dtype: str) -> None:
    bits, form = (16 if dtype == "<i2" else 32), (1 if dtype == "<u4" else 2)
    path = tmp_path / "labels.tiff"
    path.write_bytes(tiff(bits, 1, form, (RAMP[0] * 100).astype(dtype).tobytes()).read())
    errors = (PictureError, DataError, RowError)
    for load in (read_picture, lambda p: Sample("s", p, "q").picture(), picture_of):
        with pytest.raises(errors, match=r"labels\.tiff: .*nothing says which of them is white"):
            load(path)
    with pytest.raises(PictureError, match="picture in memory: its pixels are whole numbers of 32"):
        read_picture(Image.new("I", (2, 2), 7))


def fits(bits: int, values: np.ndarray) -> io.BytesIO:
    """A FITS file of one row; its whole numbers of 16 and 32 bits have a sign."""
    cards = {"SIMPLE": "T", "BITPIX": bits, "NAXIS": 2, "NAXIS1": len(values), "NAXIS2": 1}
    head = "".join(f"{key:8}= {value:>20}".ljust(80) for key, value in cards.items())
    return io.BytesIO((head + "END").ljust(2880).encode() + values.tobytes().ljust(2880, b"\0"))


@pytest.mark.parametrize(
    "file",
    [tiff(8, 1, 2, b"\xfb\x05", width=2), fits(16, np.array([-1, 1], ">i2"))],
    ids=["TIFF of 8 bits", "FITS"],
)
def test_a_sign_that_pillow_does_not_mind_is_refused(file: io.BytesIO) -> None:
    """-5 would be 251, nearly white."""
    with pytest.raises(
        PictureError, match=r"a\.tif: its pixels are whole numbers of 32 bits or wi"
    ):
        read_picture(file, "a.tif")


def test_fits_without_a_sign() -> None:
    assert greys(read_picture(fits(8, np.array([0, 200], "u1")))).tolist() == [[0, 200]]
    assert greys(read_picture(fits(-32, np.array([0, 1], ">f4")))).tolist() == [[0, 255]]


# --------------------------------------------------------------------------------- transparency


@given(st.lists(st.tuples(*[st.integers(0, 255)] * 4), min_size=1, max_size=20))
def test_transparency_is_over_white(pixels: list[tuple[int, int, int, int]]) -> None:
    image = Image.new("RGBA", (len(pixels), 1))
    image.putdata(pixels)
    colours = np.array(pixels, float)
    alpha = colours[:, 3:] / 255
    wanted = colours[:, :3] * alpha + 255 * (1 - alpha)
    for each in (image, Image.open(file_of(image, "PNG")), Image.open(file_of(image, "TIFF"))):
        seen = np.asarray(read_picture(each))[0].astype(float)
        assert np.abs(seen - wanted).max() <= 1.01
        assert (seen[alpha[:, 0] == 1] == colours[alpha[:, 0] == 1][:, :3]).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_drawing_on_nothing_is_on_a_white_page(kind: str, mode: str) -> None:
    image = Image.new(mode, (20, 20))
    image.paste(Image.new(mode, (5, 5), (0, 255) if mode == "LA" else (0, 0, 0, 255)), (5, 5))
    options = {"lossless": True} if kind == "WEBP" else {}
    seen = read_picture(file_of(image, kind, **options))
    assert seen.getpixel((0, 0)) == WHITE
    assert seen.getpixel((7, 7)) == (0, 0, 0)


def with_key(mode: str, key: object, *pixels: object) -> Image.Image:
    image = Image.new(mode, (len(pixels), 1))
    for place, pixel in enumerate(pixels):
        image.putpixel((place, 0), pixel)
    if mode == "P":
        image.putpalette([10, 20, 30, 40, 50, 60])
    return Image.open(file_of(image, "PNG", transparency=key))


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        (with_key("P", 1, 0, 1), [(10, 20, 30), WHITE]),
        (with_key("P", b"\xff\x00", 0, 1), [(10, 20, 30), WHITE]),
        (with_key("L", 7, 7, 9), [WHITE, (9, 9, 9)]),
        (with_key("1", 0, 0, 1), [WHITE, WHITE]),
        (with_key("RGB", (1, 2, 3), (1, 2, 3), (3, 2, 1)), [WHITE, (3, 2, 1)]),
        (
            Image.open(png(16, 0, 3, struct.pack(">3H", 257, 258, 514), struct.pack(">H", 258))),
            [(1, 1, 1), WHITE, (2, 2, 2)],
        ),
    ],
    ids=["P", "P-many", "L", "1", "RGB", "I;16"],
)
def test_one_colour_may_be_transparent(image: Image.Image, wanted: list[tuple[int, ...]]) -> None:
    assert "transparency" in image.info
    seen = read_picture(image)
    assert [seen.getpixel((x, 0)) for x in range(seen.width)] == wanted


def test_a_transparent_colour_of_more_bits_than_are_decoded_is_refused() -> None:
    for key in (999, 9):  # one of 9 would be black, and 9 * 256 be taken for it
        file = png(16, 2, 1, struct.pack(">3H", 9, 9, 9), struct.pack(">3H", key, 9, 9))
        with pytest.raises(PictureError, match=r"a\.png: one colour of 16 bits is transparent"):
            read_picture(file, "a.png")


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        (Image.new("PA", (1, 1), (0, 0)), WHITE),
        (Image.new("La", (1, 1), (0, 0)), WHITE),
        (Image.new("La", (1, 1), (64, 128)), (191, 191, 191)),
        (Image.new("RGBa", (1, 1), (0, 0, 0, 0)), WHITE),
        (Image.new("RGBX", (1, 1), (1, 2, 3, 0)), (1, 2, 3)),
        (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("CMYK", (1, 1), (0, 0, 0, 0)), WHITE),
        (Image.new("YCbCr", (1, 1), (255, 128, 128)), WHITE),
        (Image.new("LAB", (1, 1), (255, 128, 128)), WHITE),
        (Image.new("HSV", (1, 1), (0, 255, 255)), (255, 0, 0)),
        (Image.new("1", (1, 1), 1), WHITE),
        (Image.new("L", (1, 1), 7), (7, 7, 7)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_other_modes(image: Image.Image, wanted: tuple[int, ...]) -> None:
    seen = read_picture(image)
    assert seen.mode == "RGB"
    pixel = seen.getpixel((0, 0))
    assert isinstance(pixel, tuple)
    assert np.abs(np.array(pixel) - wanted).max() <= 2


@given(st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"]), st.data())
def test_a_picture_read_twice_is_the_picture(mode: str, data: st.DataObject) -> None:
    wide, high = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    noise = data.draw(st.binary(min_size=wide * high * 4, max_size=wide * high * 4))
    image = Image.frombytes("RGBA", (wide, high), noise)
    image = image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)
    kept = image.tobytes()
    once = read_picture(image)
    assert (once.mode, once.size) == ("RGB", (wide, high))
    assert read_picture(once).tobytes() == once.tobytes()
    assert image.tobytes() == kept  # and is left as it was


# ------------------------------------------------------------------------- frames and orientation


def test_the_first_frame_of_several() -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "TIFF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        file = file_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert read_picture(file).getpixel((0, 0)) == (255, 0, 0)


def test_a_frame_of_a_gif_with_nothing_behind_it() -> None:
    frame = Image.new("P", (2, 1))
    frame.putpalette([200, 0, 0, 0, 0, 0])
    frame.putpixel((1, 0), 1)
    seen = read_picture(file_of(frame, "GIF", transparency=1))
    assert [seen.getpixel((x, 0)) for x in (0, 1)] == [(200, 0, 0), WHITE]


@pytest.mark.parametrize("mode", ["I;16", "RGBA", "L"])
def test_numbers_and_transparency_are_turned_as_well(mode: str) -> None:
    image = Image.fromarray(RAMP)
    turned = Image.fromarray(RAMP.astype(np.uint16) * 257) if mode == "I;16" else image
    exif = turned.getexif()
    exif[ExifTags.Base.Orientation] = 6
    file = file_of(turned if mode == "I;16" else turned.convert(mode), "PNG", exif=exif)
    assert (greys(read_picture(file)) == np.rot90(RAMP, -1)).all()


@pytest.mark.parametrize(
    ("kind", "value"), [(3, b"\6\0"), (4, b"\6\0\0\0"), (11, struct.pack("<f", 6))]
)
def test_orientations_of_any_type_of_number(kind: int, value: bytes) -> None:
    exif = b"Exif\0\0II*\0" + struct.pack("<IHHHI", 8, 1, 274, kind, 1) + value.ljust(8, b"\0")
    assert read_picture(file_of(Image.new("L", (3, 2)), "JPEG", exif=exif)).size == (2, 3)


# --------------------------------------------------------------------------------------- errors


def test_what_is_no_picture_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("no")
    with pytest.raises(NoPictureError) as caught:
        read_picture(path)
    assert str(caught.value) == f"{path} is not a picture that Pillow can read"
    with pytest.raises(RowError, match="from its bytes: it is in no format that Pillow knows"):
        picture_of(b"no")
    with pytest.raises(PictureError, match=r"cannot read the picture .*b\.png: .*No such file"):
        read_picture(tmp_path / "b.png")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe.png", "folder.png"):
        with pytest.raises(PictureError, match=rf"{name}: it is no file, but a folder, a pipe or"):
            read_picture(tmp_path / name)


def bomb() -> bytes:
    """A PNG that says it has 40,000 times 40,000 pixels."""
    made = bytearray(png(8, 0, 1, b"\0").read())
    made[16:24] = struct.pack(">II", 40_000, 40_000)
    made[29:33] = struct.pack(">I", zlib.crc32(made[12:29]))
    return bytes(made)


def broken() -> bytes:
    """A PNG whose data chunk has another checksum."""
    made = bytearray(png(8, 0, 1, b"\0").read())
    made[made.index(b"IDAT") + 6] ^= 0xFF
    return bytes(made)


@pytest.mark.parametrize("data", [bomb(), broken(), png(8, 0, 1, b"\0").read()[:45]])
def test_damage_is_an_error_of_ours_for_every_loader(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(data)
    for load in loaders()[:6]:
        with pytest.raises((PictureError, DataError, RowError)):
            load(path)


def test_formats_are_known_by_content(tmp_path: Path) -> None:
    path = tmp_path / "picture"
    Image.new("L", (1, 1)).save(path, "PNG")
    assert is_picture(path)
    path.write_text("words")
    assert not is_picture(path)
    path.write_bytes(b"")
    assert not is_picture(path)
    path.write_bytes(bomb())
    assert is_picture(path)
    with pytest.raises(OSError, match="No such file"):
        is_picture(tmp_path / "none")


def test_the_table_names_every_ending_in_small_letters() -> None:
    assert all(each == each.lower() and each.startswith(".") for each in pictures.PICTURES)
