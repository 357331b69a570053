"""A flash attention for CPUs: what the kernel is given and how it reads that, not how it is fast.

It sees a `(batch, keys)` padding mask or None, never a 4-D mask; queries are the newest keys; and
gaps in the position ids of one row without a mask mean several packed sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_flash_attention_utils import _is_packed_sequence
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "fake_flash"


def fake_flash(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    packed: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    batch, heads, queries, channels = query.shape
    keys = key.shape[2]
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    seams = torch.zeros(1, queries, dtype=torch.int64)
    if attention_mask is None:
        if _is_packed_sequence(position_ids, batch):
            assert packed, "taken for several packed sequences"
            assert position_ids is not None
            seams = (position_ids == 0).cumsum(1)
        attention_mask = torch.ones(batch, keys, dtype=torch.bool)
    assert attention_mask.shape == (batch, keys), f"{tuple(attention_mask.shape)}, {keys} keys"
    causal = module.is_causal if is_causal is None else is_causal
    out = torch.zeros(batch, queries, heads, channels)
    for row in range(batch):
        real = attention_mask[row].bool()
        asking = real[-queries:] if queries > 1 else torch.ones(1, dtype=torch.bool)
        # In float64, so that no rounding of its own adds to the model's.
        q, k, v = (x[row].double() for x in (query, key, value))
        q, k, v = q[:, asking], k[:, real], v[:, real]
        logits = q @ k.mT * (scaling or channels**-0.5)
        if causal:
            newest = k.shape[1] - q.shape[1]
            visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(newest)
            if packed and bool(seams.any()):
                visible &= seams[0, :, None] == seams[0, None, :]
            logits = logits.masked_fill(~visible, -torch.inf)
        out[row, asking] = (logits.softmax(-1) @ v).transpose(0, 1).to(out)
    return out, None


@contextmanager
def flash_attention(model: Any, packed: bool = False) -> Iterator[None]:
    """Let towers and language model of `model` use it, and clean up after it.

    With `packed`, steps in position ids may be seams; otherwise none may be taken for one.
    """
    towers = [part for name, part in model.model.named_children() if name.endswith("_tower")]
    configs = [part.config for part in (model.model.language_model, *towers)]
    before = [config._attn_implementation for config in configs]
    ALL_ATTENTION_FUNCTIONS.register(NAME, partial(fake_flash, packed=packed))
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    try:
        # Set directly: the public setter looks for a kernel of this name on the hub.
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
        for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            # The registry has no `unregister`, and shares one mapping between all its instances.
            type(functions)._global_mapping.pop(NAME)
