"""Attention maps of a tower, caught where torch computes them: an oracle that nobody has to write.

Nothing of an adapter is used. What `scaled_dot_product_attention` is given, and what a softmax over
square maps returns, is noted in the order of the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import ShapeError
from ..signals import ClsAttention, GivenAttention, ReceivedAttention, Signal, resolve_layers


def own_maps(run: Callable[[], object]) -> list[Tensor]:
    """`(batch, heads, tokens, tokens)` float64 maps of every block, in order, as `run` goes."""
    noted = _Notes()
    with noted:
        run()
    return noted.maps


def row_of(
    maps: Sequence[Tensor], signal: Signal, tokens: int, feature_layer: int
) -> Tensor | None:
    """What `signal` should be by `maps`, where visual tokens stand last and [CLS] first.

    Args:
        maps: of every block, in order.
        signal: what was asked for.
        tokens: visual tokens of a row.
        feature_layer: Python-style index of the block whose output is the features.

    Returns:
        The answer, or None for a kind that maps do not tell.
    """
    kinds = {
        ClsAttention: lambda x: x[:, :, 0, -tokens:],
        ReceivedAttention: lambda x: x[:, :, -tokens:, -tokens:].mean(2),
        GivenAttention: lambda x: x[:, :, -tokens:, -tokens:].mean(3),
    }
    if type(signal) not in kinds or not maps or maps[0].shape[-1] < tokens:
        return None
    try:
        layers = resolve_layers(
            getattr(signal, "layers"),  # noqa: B009
            feature_layer % len(maps),
            len(maps),
        )
    except ShapeError:
        return None
    return torch.stack([kinds[type(signal)](maps[layer]) for layer in layers], dim=1)  # type: ignore[no-untyped-call]


class _Notes(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._note(_map_of(*args, **kwargs))
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if func in (F.softmax, torch.softmax, Tensor.softmax):
            self._note(out.double())
        return out

    def _note(self, found: Tensor | None) -> None:
        if found is not None and found.ndim == 4 and found.shape[-1] == found.shape[-2] > 1:
            self.maps.append(found)


def _map_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    if is_causal or query.shape[:-2] != key.shape[:-2]:
        return None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = query.double() @ key.double().mT * scale
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, -torch.inf)
        else:
            logits = logits + attn_mask.double()
    return logits.softmax(-1)
