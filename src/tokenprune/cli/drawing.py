"""Files of drawings."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .errors import CommandError

DESCRIPTION = "Description"
"""The field of a PNG that says in words what it shows; pages use it as alternative text."""


def picture_file(path: Path, name: str) -> Path:
    """The file to write: `path` itself, or `name` in it, where it is a folder or has no ending.

    Raises:
        CommandError: an ending that is no picture format.
    """
    if path.is_dir() or not path.suffix:
        return path / name
    known = Image.registered_extensions()
    if known.get(path.suffix.lower()) not in Image.SAVE:
        raise CommandError(
            f"cannot write a picture to {path}; name it .png, .jpg or .webp, or give a folder"
        )
    return path


def write_picture(picture: Image.Image, path: Path, description: str = "") -> None:
    """Save `picture`; its folder is made where it does not exist. A PNG keeps `description`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if description and path.suffix.lower() == ".png":
            notes = PngInfo()
            notes.add_itxt(DESCRIPTION, description)
            picture.save(path, optimize=True, pnginfo=notes)
        else:
            picture.save(path, optimize=True)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error}") from error
