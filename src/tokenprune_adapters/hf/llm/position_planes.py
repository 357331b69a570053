"""Position ids of one plane, or of several (M-RoPE): `(batch, slots)` or `(batch, slots, planes)`.

Models with M-RoPE count time, row and column. transformers has their planes in front; here they are
last, so that rows are gathered alike whatever there is. A fourth plane, the first, counts as text.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

PLANES = (3, 4)
"""Numbers of planes that M-RoPE has, without those of text and with them."""


def inwards(given: Tensor) -> Tensor:
    """`(planes, batch, slots)` of transformers with its planes last; one plane as it is."""
    return given.movedim(0, -1) if given.ndim == 3 else given


def outwards(positions: Tensor) -> Tensor:
    """Position ids as a language model of transformers takes them."""
    return positions.movedim(-1, 0) if positions.ndim == 3 else positions


def rotated(positions: Tensor) -> Tensor:
    """Position ids as a rotary embedding takes them: the plane of text is not among them."""
    planes = outwards(positions)
    return planes[1:] if planes.ndim == 3 and planes.shape[0] == 4 else planes


def of_text(positions: Tensor) -> Any:
    """`(batch, slots)` as decoder layers get them: of several planes the text's, or None."""
    if positions.ndim == 2:
        return positions
    return positions[..., 0] if positions.shape[-1] == 4 else None
