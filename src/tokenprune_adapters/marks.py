"""Marks on projected features: dropped rows are -inf, so the decision travels with the features.

`generate` encodes images outside of `forward`, regroups their features per beam and slices them
per chunk. A mark in the features themselves survives all of that in every version, without side
channels; and a path that misses the language model's hook gives NaN instead of a silent error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenprune.plan import Plan


def spread(projected: Tensor, plan: Plan) -> Tensor:
    """Put kept rows back at their anchors, marks everywhere else.

    Args:
        projected: `(batch, kept, channels)`.
        plan: what was kept of `plan.tokens` slots.

    Returns:
        `(batch, tokens, channels)`.
    """
    batch, _, channels = projected.shape
    # One row more, to which fillers are written.
    full = projected.new_full((batch * plan.tokens + 1, channels), -torch.inf)
    offset = torch.arange(batch, device=projected.device)[:, None] * plan.tokens
    index = (plan.anchors + offset).masked_fill(~plan.mask, batch * plan.tokens)
    full = full.index_copy(0, index.flatten(), projected.flatten(0, 1))
    return full[:-1].reshape(batch, plan.tokens, channels)


def marked(features: Tensor) -> Tensor:
    """`(..., channels)` to `(...)` bool: True where a row is a mark."""
    return features[..., 0].isneginf()
