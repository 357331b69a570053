"""Pictures as models want them: upright, 8 bits, RGB. The one loader of all commands.

`Image.convert("RGB")` does not decode. It cuts off what 8 bits do not hold, so that 16-bit grey is
white and floats in [0, 1] are black, and it drops transparency, so that a drawing on nothing is a
black page.

| the file holds | the picture is |
|---|---|
| 8 bits per channel, a palette, 1 bit | as it is; CMYK, YCbCr, Lab and HSV become RGB |
| 16-bit grey | 65535 is white; of a TIFF with 9 to 15 bits, its own largest number |
| floats | 1.0 is white; refused where any is outside of [0, 1] |
| whole numbers of 32 bits, or with a sign | refused: nothing says which is white |
| transparency of any kind | over white |
| an orientation in its EXIF data | turned upright |
| several frames or pages | the first |
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeAlias

from .errors import TokenpruneError

if TYPE_CHECKING:
    from PIL import Image

Source: TypeAlias = "str | Path | IO[bytes] | Image.Image"
"""A file by its name, an open one, or a picture that Pillow holds."""

PICTURES = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif", ".jp2")
)
"""Endings of files that are taken for pictures without a look inside."""

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
"""Those of `PICTURES`. Pillow takes almost any file for one of some others, such as TGA."""

_PHOTOMETRIC, _BITS, _FORM, _WHITE_IS_ZERO, _SIGNED = 262, 258, 339, 0, 2  # of TIFF
_BY_NUMBER = frozenset({"I", "F", "I;16", "I;16B", "I;16L", "I;16N"})
_HALF = 0.5  # what is a fraction of 255 is rounded half up


class PictureError(TokenpruneError, ValueError):
    """A picture that cannot be decoded, or not with a sure meaning.

    Attributes:
        reason: what is wrong, without the name.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"cannot read the picture {name}: {reason}")
        self.reason = reason


class NoPictureError(PictureError):
    """A file in no format that Pillow knows."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "it is in no format that Pillow knows")
        self.args = (f"{name} is not a picture that Pillow can read",)


def read_picture(source: Source, name: str | None = None) -> Image.Image:
    """The picture in a file, or a picture of another mode, in RGB (see the module's table).

    Args:
        source: a file or a picture.
        name: name of the picture, for errors; by default the file's.

    Raises:
        PictureError: no such file, no picture, damage, or numbers without a sure meaning.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, Image.Image):
        return _guarded(source, name or "in memory")
    shown = name or str(source)
    if isinstance(source, str | Path) and Path(source).exists() and not Path(source).is_file():
        # To open a pipe would wait for somebody to write into it.
        raise PictureError(shown, "it is no file, but a folder, a pipe or a device")
    try:
        opened = Image.open(source)
    except UnidentifiedImageError as error:
        raise NoPictureError(shown) from error
    except Exception as error:  # not there, or too large to be meant, or damaged at its start
        raise PictureError(shown, _said(error)) from error
    with opened:
        return _guarded(opened, shown)


def is_picture(path: Path) -> bool:
    """Whether a file begins as pictures of common formats do, whatever its name.

    Raises:
        OSError: it cannot be opened.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        Image.open(path, formats=_FORMATS).close()
    except UnidentifiedImageError:
        return False
    except OSError:
        raise
    except Exception:  # the format is known, or nothing would have been found amiss
        return True
    return True


def _guarded(image: Image.Image, name: str) -> Image.Image:
    try:
        _check_key(image, name)
        image.load()  # decodes all of it: damage shows here. Some decoders also turn the picture.
        return _turned(_decoded(image, name), image)
    except PictureError:
        raise
    except Exception as error:  # decoders raise whatever they like on damaged files
        raise PictureError(name, _said(error)) from error


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


def _decoded(image: Image.Image, name: str) -> Image.Image:
    """`image` in RGB, as it was stored."""
    if image.mode in _BY_NUMBER or _tag(image, _FORM) == _SIGNED:
        return _of_numbers(image, name)
    if image.mode == "La":
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    return _over_white(image.convert("RGBA"))


def _check_key(image: Image.Image, name: str) -> None:
    """Refuse one transparent colour of 16 bits. Only before it is decoded, a picture tells."""
    key = image.info.get("transparency")
    wide = any(isinstance(tile[3], str) and ";16" in tile[3] for tile in getattr(image, "tile", ()))
    if isinstance(key, tuple) and (wide or max(key) > 255):
        raise PictureError(
            name,
            f"one colour of 16 bits is transparent, {key}, but colours are decoded to 8 bits, so "
            "other pixels could vanish; save it with an alpha channel",
        )


def _over_white(image: Image.Image) -> Image.Image:
    """RGBA `image` on a white page: paper, and what most drawings were made for."""
    from PIL import Image

    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image)
    return page.convert("RGB")


def _of_numbers(image: Image.Image, name: str) -> Image.Image:
    """RGB of a picture with one number per pixel, black at 0."""
    from PIL import Image

    white = _white(image, name)
    numbers = image.convert("I").convert("F") if image.mode.startswith("I") else image
    grey = _scaled(numbers, 255 / white)
    if _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow minds it in 8 bits alone
        grey = grey.point([255 - value for value in range(256)])
    key = image.info.get("transparency")
    if isinstance(key, int):
        # Both differences are 0 where a number is the one that stands for nothing.
        above = numbers.point(lambda value: value * 1 - key).convert("L")
        below = numbers.point(lambda value: value * -1 + key).convert("L")
        grey = _where_zero(above, below, grey, Image.new("L", grey.size, 255))
    return grey.convert("RGB")


def _where_zero(
    one: Image.Image, two: Image.Image, other: Image.Image, there: Image.Image
) -> Image.Image:
    """`there` where both `one` and `two` are 0, else `other`; all are grey."""
    from PIL import Image, ImageChops

    mask = ImageChops.lighter(one, two).point([255, *[0] * 255])
    return Image.composite(there, other, mask)


def _scaled(numbers: Image.Image, factor: float) -> Image.Image:
    """Grey of floats times `factor`."""
    return numbers.point(lambda value: value * factor + _HALF).convert("L")


def _white(image: Image.Image, name: str) -> float:
    """The number that is white.

    Raises:
        PictureError: nothing says which it is.
    """
    if image.mode == "F":
        low, high = image.getextrema()
        if not _inside(image, low, high):
            raise PictureError(
                name,
                f"its pixels are floats from {low} to {high}, and only those from 0 (black) to 1 "
                "(white) have a sure meaning; rescale it to that, or to 8 bits",
            )
        return 1.0
    # Pillow holds 16-bit PGM, and older versions of it 16-bit PNG, in 32 bits. Those of 8 bits in
    # a TIFF, and of 16 in a FITS file, it holds as if they had no sign.
    wide = image.mode == "I" and image.format not in ("PNG", "PPM")
    if wide or image.format == "FITS" or _tag(image, _FORM) == _SIGNED:
        seen = ", from {} to {}".format(*image.getextrema()) if image.mode == "I" else ""
        raise PictureError(
            name,
            f"its pixels are whole numbers of 32 bits or with a sign{seen}, and nothing says which "
            "of them is white; rescale it to 8 or 16 bits without a sign",
        )
    bits = _tag(image, _BITS)
    return 2.0 ** (bits if 8 < bits < 16 else 16) - 1


def _inside(image: Image.Image, low: object, high: object) -> bool:
    """Whether all floats are in [0, 1]; extremes do not tell of NaN, of which a mean is one."""
    from PIL import Image

    assert isinstance(low, float)
    assert isinstance(high, float)
    mean = image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    return low >= 0 and high <= 1 and mean == mean


def _tag(image: Image.Image, number: int) -> int:
    """A number in the head of a TIFF, the first of several; -1 where there is none."""
    value = getattr(image, "tag_v2", {}).get(number, -1)
    first = value[0] if isinstance(value, tuple) else value
    return first if isinstance(first, int) else -1


def _turned(decoded: Image.Image, image: Image.Image) -> Image.Image:
    """`decoded` turned as the EXIF data of `image` says, as transformers and vLLM open pictures.

    Cameras store what the sensor saw, and beside it how they were held. Pillow's `exif_transpose`
    also writes the EXIF data anew, and fails where it cannot, as with tags of the wrong type.
    """
    from PIL import ExifTags, Image

    turns = (
        Image.Transpose.FLIP_LEFT_RIGHT,
        Image.Transpose.ROTATE_180,
        Image.Transpose.FLIP_TOP_BOTTOM,
        Image.Transpose.TRANSPOSE,
        Image.Transpose.ROTATE_270,
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_90,
    )
    try:
        said = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a picture whose EXIF data is damaged is a picture all the same
        return decoded
    # Some write it as a fraction.
    return decoded.transpose(turns[int(said) - 2]) if said in range(2, 9) else decoded
