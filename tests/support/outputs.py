"""Outputs of models of transformers, read by name in every release, without tokenprune's wall."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def shown_features(output: Any, kind: str = "image") -> Tensor:
    """`(slots, channels)` features that a caller is shown, of all pictures or videos."""
    if f"{kind}_outputs" in type(output).__dataclass_fields__:  # transformers 5.24 and newer
        shown = output[f"{kind}_outputs"].pooler_output
    else:
        shown = output[f"{kind}_hidden_states"]
    return torch.cat(list(shown)) if isinstance(shown, (list, tuple)) else shown


def cache_of(output: Any) -> Any:
    """The KV cache of an output."""
    return output["cache" if "cache" in type(output).__dataclass_fields__ else "past_key_values"]


def cache_argument() -> str:
    """Name of the argument of `forward` and `generate` that takes a KV cache."""
    import inspect

    from transformers import LlamaModel

    taken = inspect.signature(LlamaModel.forward).parameters
    return "cache" if "cache" in taken else "past_key_values"
