"""Marks on projected features: dropped rows are -inf, so the decision travels with the features.

`generate` encodes images outside of `forward`, regroups their features per beam and slices them
per chunk. A mark in the features themselves survives all of that in every version, without side
channels; and a path that misses the language model's hook gives NaN instead of a silent error.
"""

from __future__ import annotations

import torch
from torch import Tensor


def spread(projected: Tensor, index: Tensor, mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """Put kept rows back where they came from, marks everywhere else.

    Args:
        projected: `(batch, kept, channels)`.
        index: `(batch, kept)` int64, the slot of each, counted over all slots of `shape`.
        mask: `(batch, kept)` bool, False for fillers.
        shape: number of images (or crops), and number of tokens of each.

    Returns:
        `(images, tokens, channels)`.

    >>> kept = spread(torch.ones(1, 2, 5), torch.tensor([[0, 3]]), torch.ones(1, 2) > 0, (1, 4))
    >>> marked(kept)
    tensor([[False,  True,  True, False]])
    """
    total, channels = shape[0] * shape[1], projected.shape[2]
    # One row more, to which fillers are written.
    full = projected.new_full((total + 1, channels), -torch.inf)
    index = index.masked_fill(~mask, total).flatten()
    return full.index_copy(0, index, projected.flatten(0, 1))[:-1].reshape(*shape, channels)


def marked(features: Tensor) -> Tensor:
    """`(..., channels)` to `(...)` bool: True where a row is a mark."""
    return features[..., 0].isneginf()
