"""Pictures as parts of a page: inside of it, so that it needs no other file."""

from __future__ import annotations

import base64
from pathlib import Path

from PIL import Image

from .markup import Html, join, tag

PLOTS = {
    "accuracy.png": "Accuracy against visual tokens kept; bars are one standard error.",
    "pareto.png": "Accuracy against time of a question; the line joins what nothing faster"
    " reaches.",
}
AGREEMENT = {
    "consistency.png": "Overlap and rank correlation of scores with the attention of each LLM"
    " layer.",
    "over_k.png": "Agreement over K, the number of vision layers whose [CLS] attention is"
    " averaged.",
}
_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}


def pictures_in(folder: Path) -> dict[str, Path]:
    """Picture files of `folder` by name, in order."""
    return {path.name: path for path in sorted(folder.iterdir()) if path.suffix.lower() in _TYPES}


def figures(found: dict[str, Path], captions: dict[str, str]) -> Html:
    """Those of `found` that `captions` names, and takes them out of it."""
    return join([figure(found.pop(name), captions[name]) for name in captions if name in found])


def figure(path: Path, caption: str = "") -> Html:
    """A picture under its caption; what a PNG says of itself is its alternative text."""
    data = path.read_bytes()
    try:
        with Image.open(path) as opened:
            width, height = opened.size
            said = str(opened.info.get("Description", ""))
    except Exception:  # decoders raise whatever they like on damaged files; the browser may know
        width, height, said = 0, 0, ""
    kind = _TYPES[path.suffix.lower()]
    shown = tag(
        "img",
        src=f"data:{kind};base64,{base64.b64encode(data).decode()}",
        alt=said or caption or path.stem,
        width=width or None,
        height=height or None,
    )
    return tag("figure", shown, tag("figcaption", caption or path.name))
