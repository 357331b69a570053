"""Attention rows, recomputed from queries and keys so that the model's own kernel stays on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenprune.metric import wide
from tokenprune.precision import full_precision

_CHUNK = 2**22
"""Most elements of the piece of an attention matrix that is looked at in one go."""


def attention(query: Tensor, keys: Tensor) -> Tensor:
    """Attention rows of some queries to all keys, softmax in float32.

    Args:
        query: `(batch, heads, queries, channels)`.
        keys: `(batch, heads or fewer, tokens, channels)`; several heads may share one of keys.

    Returns:
        `(batch, heads, queries, tokens)` float32; rows sum to one.

    >>> attention(torch.rand(2, 8, 1, 64), torch.rand(2, 2, 577, 64)).shape
    torch.Size([2, 8, 1, 577])
    """
    return torch.softmax(products(query, keys), dim=-1)


def products(query: Tensor, keys: Tensor) -> Tensor:
    """Scaled products, `(batch, heads, queries, tokens)` float32, of which `attention` is softmax.

    Args:
        query: queries as for `attention`.
        keys: keys as for `attention`.
    """
    if keys.shape[1] != query.shape[1]:
        keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
    with full_precision(query.device):
        return dot(query, keys) / math.sqrt(query.shape[-1])


def dot(query: Tensor, keys: Tensor) -> Tensor:
    """Products of queries and keys in float32, `(batch, heads, queries, tokens)`.

    Heads of a projection lie side by side, so keys are a strided view, which a product over a whole
    batch copies first. For a few queries that costs ten times the product itself, so on a CPU each
    image has its own, which also makes it the same alone and in a batch.

    Args:
        query: `(batch, heads, queries, channels)`.
        keys: `(batch, heads, tokens, channels)`.
    """
    if keys.device.type != "cpu" or keys.is_contiguous() or keys.shape[0] < 2:
        return query.float() @ keys.float().mT
    return torch.stack([q.float() @ k.float().mT for q, k in zip(query, keys, strict=True)])


def joint_attention(products: Tensor) -> Tensor:
    """Attention row of one query as one head over all channels, softmax in float64.

    Args:
        products: `(batch, heads, tokens)` scaled products of ALL heads, all keys among the tokens.

    Returns:
        `(batch, tokens)` float32; rows sum to one.
    """
    total = wide(products).sum(1) / math.sqrt(products.shape[1])
    return torch.softmax(total, dim=-1).float()


def attention_margins(query: Tensor, keys: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Means over the queries and over the keys of the attention among patches.

    The matrix is looked at in pieces and never kept.

    Args:
        query: `(batch, heads, prefix + tokens, channels)`.
        keys: keys as for `attention`.
        prefix: tokens before the patches, which count in the softmax alone.

    Returns:
        What each patch receives and what it gives, `(batch, heads, tokens)` float32 both.
    """
    query = query[:, :, prefix:]
    batch, heads, tokens = query.shape[:3]
    received, given = query.new_zeros(batch, heads, tokens, dtype=torch.float32), []
    for part in torch.split(query, max(1, _CHUNK // (batch * heads * keys.shape[2])), dim=2):
        among = attention(part, keys)[:, :, :, prefix:]
        received += among.sum(2)
        given.append(among.mean(3))
    return received / max(tokens, 1), torch.cat(given, dim=2)
