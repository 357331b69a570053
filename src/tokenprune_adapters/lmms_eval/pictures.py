"""Pictures of a task of lmms-eval, decoded as all our commands decode them.

Most tasks hand over RGB, which stays as it is. What another one hands over would go through a plain
`convert("RGB")` in the processor, which turns 16-bit grey white and transparency black.
"""

from __future__ import annotations

import functools
from typing import Any

from tokenprune.pictures import read_picture


def decode_before(image_processor: Any) -> None:
    """Let an image processor of transformers see decoded pictures; it is this process's own."""
    original = image_processor.preprocess

    @functools.wraps(original)
    def preprocess(images: object, *args: Any, **kwargs: Any) -> Any:
        return original(_decoded(images), *args, **kwargs)

    image_processor.preprocess = preprocess


def _decoded(images: object) -> object:
    """`images`, a picture or nested lists of them; what is not Pillow's stays as it is."""
    from PIL import Image

    if isinstance(images, (list, tuple)):
        return [_decoded(each) for each in images]
    return read_picture(images, "of the task") if isinstance(images, Image.Image) else images
