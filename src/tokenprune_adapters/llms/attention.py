"""Attention ROWS of a decoder layer, from its own projections: no eager attention, no full map."""

from __future__ import annotations

import sys
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from tokenprune.errors import UnsupportedError

from ..layout import Layout
from .images import Images, Seats
from .segment import Segment

Rotary = tuple[Tensor, Tensor]


def check_layer(layer: nn.Module) -> None:
    """Refuse decoder layers whose rows cannot be recomputed.

    Raises:
        UnsupportedError: the layer is not built like Llama's, or normalises queries and keys.
    """
    attention: Any = getattr(layer, "self_attn", None)
    parts = ("q_proj", "k_proj", "head_dim", "scaling")
    missing = [name for name in parts if not hasattr(attention, name)]
    missing += [] if hasattr(layer, "input_layernorm") else ["input_layernorm"]
    extra = [name for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    if missing or extra:
        raise UnsupportedError(
            f"attention rows of {type(layer).__name__} cannot be recomputed: "
            + "; ".join(
                [f"it has no {name}" for name in missing] + [f"it has {name}" for name in extra]
            )
        )


def attention_to_images(
    layer: nn.Module,
    hidden: Tensor,
    rotary: Rotary,
    segment: Segment,
    images: Images,
    seats: Seats,
    cached: Tensor | None,
    every_text_token: bool,
) -> Tensor:
    """Attention of the text to each image's tokens, `(images, heads, tokens)`.

    Args:
        layer: a decoder layer like Llama's.
        hidden: `(batch, slots, channels)`, what went into it.
        rotary: cosine and sine at those slots.
        segment: the segment that the layer belongs to.
        images: which of the slots are visual.
        seats: where the tokens of each image sit.
        cached: the layer's rotated keys where they are at hand, see `query_rows`.
        every_text_token: the mean over all text tokens after an image, or the prompt's last token.
    """
    numbers = torch.arange(seats.slots, device=hidden.device)
    real = segment.real
    if real is None:
        real = torch.ones_like(segment.place, dtype=torch.bool)
    last = torch.where(real, numbers, -1).amax(1, keepdim=True).clamp(min=0)
    if not every_text_token:
        rows = query_rows(layer, hidden, rotary, last, segment.after.valid, cached)[seats.row]
        return _columns(rows[:, :, 0], seats)
    in_image = images.image >= 0
    text = real & ~in_image & (in_image.cumsum(1) > 0)
    queries = Layout.of(text | (numbers == last))
    rows = query_rows(layer, hidden, rotary, queries.index, segment.after.valid, cached)
    if queries.valid is not None:
        # A filler may be padding, which attends to nothing: NaN.
        rows = rows.masked_fill(~queries.valid[:, None, :, None], 0)
    asks = text.gather(1, queries.index)[seats.row]
    asks = asks & (queries.index[seats.row] > seats.column.amax(1, keepdim=True))
    # An image that ends its prompt is asked about by the last token alone.
    alone = ~asks.any(1, keepdim=True)
    asks = torch.where(alone, (queries.index == last)[seats.row], asks).float()
    weight = asks / asks.sum(1, keepdim=True)
    mean = einsum(rows[seats.row], weight, "image heads query key, image query -> image heads key")
    return _columns(mean, seats)


def _columns(rows: Tensor, seats: Seats) -> Tensor:
    """`(images, heads, keys)` to `(images, heads, tokens)`; `seats` are among the newest keys."""
    columns = seats.column + rows.shape[2] - seats.slots
    return rows.gather(2, columns[:, None, :].expand(-1, rows.shape[1], -1))


def query_rows(
    layer: nn.Module,
    hidden: Tensor,
    rotary: Rotary,
    queries: Tensor,
    valid: Tensor | None,
    cached: Tensor | None,
) -> Tensor:
    """Attention of a few queries to every key of the layer, softmax in float32.

    Args:
        layer: a decoder layer like Llama's.
        hidden: `(batch, slots, channels)`, what went into it.
        rotary: cosine and sine, `(batch or 1, slots, channels of a head)`.
        queries: `(batch, queries)` int64, the slots that ask.
        valid: `(batch, keys)` bool, False for padding; None where there is none.
        cached: `(batch, key heads, keys, channels)` rotated keys where the layer has cached them,
            the newest of which are those of `hidden`; None to compute them.

    Returns:
        `(batch, heads, queries, keys)` float32.
    """
    attention: Any = layer.self_attn
    normalise: Any = layer.input_layernorm
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    split = "batch slots (heads channels) -> batch heads slots channels"
    batch, slots = hidden.shape[:2]
    cosine, sine = (part.expand(batch, -1, -1) for part in rotary)
    asking = _rows(hidden, queries)
    query = rearrange(attention.q_proj(normalise(asking)), split, channels=attention.head_dim)
    query, _ = rotate(query, query, _rows(cosine, queries), _rows(sine, queries))
    if cached is None:
        key = attention.k_proj(normalise(hidden))
        key = rearrange(key, split, channels=attention.head_dim)
        cached, _ = rotate(key, key, cosine, sine)
    keys = cached.shape[2]
    grouped = rearrange(query.float(), "b (g r) q c -> b g (r q) c", g=cached.shape[1])
    logits = grouped @ rearrange(cached.float(), "b g k c -> b g c k") * attention.scaling
    logits = rearrange(logits, "b g (r q) k -> b (g r) q k", q=queries.shape[1])
    visible = torch.arange(keys, device=hidden.device) <= (queries + keys - slots)[:, :, None]
    if valid is not None:
        visible = visible & valid[:, None, :]
    return torch.softmax(logits.masked_fill(~visible[:, None], -torch.inf), dim=-1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))
