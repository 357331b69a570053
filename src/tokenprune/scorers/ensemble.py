"""Ensemble of attention rows: several layers and heads become one score per token."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from einops import reduce
from torch import Tensor

from ..fields import check_choice

Ensemble: TypeAlias = Literal["avg", "max", "min"]
"""The words of VTC-CLS, eq. 9."""

_REDUCTION = {"avg": "mean", "max": "max", "min": "min"}


def check_ensemble(ensemble: str) -> None:
    """Refuse an unknown ensemble."""
    check_choice("ensemble", ensemble, get_args(Ensemble))


def ensembled(rows: Tensor, ensemble: Ensemble) -> Tensor:
    """`(batch, tokens)` float32 from `(batch, layers, heads, tokens)`: heads first, then layers."""
    per_layer = reduce(rows.float(), "batch layers heads tokens -> batch layers tokens", "mean")
    return reduce(per_layer, "batch layers tokens -> batch tokens", _REDUCTION[ensemble])
