"""Listing of a folder: its pictures, and every other file with the reason why it is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .pictures import PICTURES, is_picture

PassedOver = tuple[tuple[str, str], ...]
"""Names of files, relative to their folder, and why nothing is done with them."""


@dataclass(frozen=True)
class Listing:
    """Files of a folder, each in one of the two.

    Attributes:
        pictures: sorted names, relative to the folder: files with an ending that pictures have,
            even where they are damaged or links to nothing, and others that begin as pictures do.
        passed_over: sorted names of all others, with reasons.
    """

    pictures: tuple[str, ...]
    passed_over: PassedOver


def list_pictures(folder: Path, *, deep: bool = True) -> Listing:
    """The listing of `folder`. Files with an ending that pictures have are not opened.

    Args:
        folder: folder to look into.
        deep: whether to look into the folders below as well; links to folders are not followed.
    """
    pictures, passed_over = [], []
    for name, reason in files_of(folder, deep=deep):
        why = reason or _why_no_picture(folder / name)
        if why is None:
            pictures.append(name)
        else:
            passed_over.append((name, why))
    return Listing(tuple(sorted(pictures)), tuple(sorted(passed_over)))


def files_of(folder: Path, *, deep: bool = True) -> Iterator[tuple[str, str | None]]:
    """Every file of `folder` by its relative name, and why it cannot be looked at, or None.

    Args:
        folder: folder to look into.
        deep: whether to look into the folders below as well; else these are given as well.
    """
    unlisted: list[OSError] = []
    for place, folders, files in os.walk(folder, onerror=unlisted.append):
        here = Path(place)
        for name in files:
            yield (here / name).relative_to(folder).as_posix(), None
        for name in folders:
            below = (here / name).relative_to(folder).as_posix()
            if not deep:
                yield below, "a folder, and folders below are not looked into"
            elif (here / name).is_symlink():
                yield below, "a link to a folder, which is not followed"
        if not deep:
            break
    for error in unlisted:
        name = Path(str(error.filename)).relative_to(folder).as_posix()
        yield name, f"a folder that cannot be listed: {error.strerror}"


def _why_no_picture(path: Path) -> str | None:
    if path.name.startswith("."):
        return "its name begins with a dot"
    known = path.suffix.lower() in PICTURES
    if path.is_symlink() and not path.exists():
        return None if known else "a link to nothing"
    if not path.is_file():  # to open a pipe would wait for somebody to write into it
        return "neither a file nor a link to one"
    if known:
        return None
    try:
        return None if is_picture(path) else "it does not begin as pictures of common formats do"
    except OSError as error:
        return f"cannot be opened: {error.strerror or error}"
