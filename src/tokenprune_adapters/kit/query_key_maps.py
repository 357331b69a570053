"""Query and key maps of an attention module, by which they are recomputed from its input.

Modules are recognised by the parts that they have. One with a part that is not known here (a
relative bias, a second softmax) may compute anything, so it is not read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from tokenprune.errors import UnsupportedError
from tokenprune.precision import full_precision

from .attention_rows import attention_margins, products

Turn: TypeAlias = Callable[[Tensor], Tensor]
"""Rotation of queries or keys, `(batch, heads, tokens, channels)` to the same shape."""

_QUERY_KEY = {
    "in_proj_weight",
    "in_proj_bias",
    "q_proj_weight",
    "k_proj_weight",
    "qkv",
    "q_bias",
    "q_proj",
    "k_proj",
    "q",
    "kv",
    "latent",
    "ln_q",
    "ln_k",
    "q_norm",
    "k_norm",
}
_AFTER_ROWS = {
    "v_proj_weight",
    "v_proj",
    "v_bias",
    "attn_drop",
    "head_scale",
    "norm",
    "ln_inner",
    "gate",
    "proj",
    "proj_drop",
    "out_proj",
    "out_drop",
    "mlp",
}


@dataclass(frozen=True, eq=False)
class Linear:
    """Linear map to queries or keys, and the norm behind it.

    Attributes:
        weight: `(heads * channels, width)`.
        bias: `(heads * channels,)` or None.
        norm: what each head's vector goes through afterwards, or None.
    """

    weight: Tensor
    bias: Tensor | None
    norm: nn.Module | None

    def __call__(self, x: Tensor, heads: int) -> Tensor:
        """`(batch, tokens, width)` to `(batch, heads, tokens, channels)`, as the model does it."""
        flat = F.linear(x, self.weight, self.bias)
        split = "batch tokens (heads channels) -> batch heads tokens channels"
        made: Tensor = rearrange(flat, split, heads=heads)
        return made if self.norm is None else self.norm(made)


@dataclass(frozen=True, eq=False)
class QueryKeyMaps:
    """Query and key maps of an attention module.

    Attributes:
        heads: number of query heads.
        query, key: maps from its input.
        latent: `(1, queries, width)` learned queries, where the module has its own.
    """

    heads: int
    query: Linear
    key: Linear
    latent: Tensor | None = None

    @classmethod
    def of(cls, attention: nn.Module) -> QueryKeyMaps:
        """Maps of `attention`, as its weights are now.

        >>> x = torch.rand(2, 10, 64)
        >>> QueryKeyMaps.of(nn.MultiheadAttention(64, num_heads=4)).first_row(x, x).shape
        torch.Size([2, 4, 10])

        Raises:
            UnsupportedError: it is not made of parts that are known; the message names them.
        """
        unknown = sorted(set(_parts(attention)) - _QUERY_KEY - _AFTER_ROWS)
        if getattr(attention, "add_zero_attn", False):
            unknown.append("add_zero_attn")
        if unknown:
            raise UnsupportedError(
                f"{type(attention).__name__} has parts that tokenprune does not know "
                f"({', '.join(unknown)}), so its attention cannot be read"
            )
        of: Any = attention
        query, key = _norm(of, "ln_q", "q_norm"), _norm(of, "ln_k", "k_norm")
        if getattr(of, "in_proj_weight", None) is not None:
            q, k, _ = of.in_proj_weight.chunk(3)
            q_bias, k_bias = _biases(of.in_proj_bias)
            return cls(of.num_heads, Linear(q, q_bias, query), Linear(k, k_bias, key))
        if getattr(of, "q_proj_weight", None) is not None:
            q_bias, k_bias = _biases(of.in_proj_bias)
            maps = Linear(of.q_proj_weight, q_bias, query), Linear(of.k_proj_weight, k_bias, key)
            return cls(of.num_heads, *maps)
        if getattr(of, "qkv", None) is not None:
            q, k, _ = _plain(of.qkv).weight.chunk(3)
            q_bias, k_bias = _biases(of.qkv.bias)
            if getattr(of, "q_bias", None) is not None:  # EVA adds one of its own
                q_bias, k_bias = of.q_bias, of.k_bias
            return cls(of.num_heads, Linear(q, q_bias, query), Linear(k, k_bias, key))
        if getattr(of, "kv", None) is not None:
            k = _plain(of.kv).weight.chunk(2)[0]
            k_bias = None if of.kv.bias is None else of.kv.bias.chunk(2)[0]
            return cls(of.num_heads, _linear(of.q, query), Linear(k, k_bias, key), of.latent)
        if getattr(of, "q_proj", None) is not None:
            return cls(of.num_heads, _linear(of.q_proj, query), _linear(of.k_proj, key))
        raise UnsupportedError(
            f"{type(attention).__name__} has no projections to queries and keys that tokenprune "
            "knows, so its attention cannot be read"
        )

    @property
    def is_bilinear(self) -> bool:
        """Whether logits are a bilinear form per head: nothing else happens to queries and keys."""
        plain = self.query.norm is None and self.key.norm is None
        return plain and self.query.weight.shape[0] == self.key.weight.shape[0]

    def first_row(self, asking: Tensor, context: Tensor, turn: Turn | None = None) -> Tensor:
        """Attention row of the first token that asks, softmax in float32.

        Args:
            asking: `(batch, queries, width)`.
            context: `(batch, tokens, width)`, what is attended to.
            turn: rotation of queries and keys, or None.

        Returns:
            `(batch, heads, tokens)` float32; rows sum to one.
        """
        return torch.softmax(self.first_products(asking, context, turn), dim=-1)

    def first_products(self, asking: Tensor, context: Tensor, turn: Turn | None = None) -> Tensor:
        """Scaled products behind `first_row`, `(batch, heads, tokens)` float32.

        Those of a head may all be off by one constant, which no softmax sees.
        """
        query = self.query(asking[:, :1], self.heads)
        if not self.is_bilinear or turn is not None:
            key = self.keys(context)
            if turn is not None:
                query, key = turn(query), turn(key)
            return products(query, key)[:, :, 0]
        with full_precision(context.device):
            # q . (W x + b) = (W' q) . x + a constant per head: instead of
            # the keys of all tokens, one vector per head is projected.
            weight = rearrange(self.key.weight.float(), "(h c) w -> h c w", h=self.heads)
            absorbed = einsum(query.float(), weight, "b h q c, h c w -> b h q w").squeeze(2)
            logits = absorbed @ context.float().mT
            return logits / math.sqrt(query.shape[-1])

    def keys(self, x: Tensor) -> Tensor:
        """`(batch, heads, tokens, channels)`, before any rotation."""
        channels = self.query.weight.shape[0] // self.heads
        return self.key(x, self.key.weight.shape[0] // channels)

    def margins(self, x: Tensor, prefix: int, turn: Turn | None) -> tuple[Tensor, Tensor]:
        """Means over the queries and over the keys of the attention among patches.

        The matrix is looked at in pieces and never kept.

        Args:
            x: `(batch, prefix + tokens, width)`.
            prefix: tokens before the patches, which count in the softmax alone.
            turn: rotation of queries and keys, or None.

        Returns:
            What each patch receives and what it gives, `(batch, heads, tokens)` float32 both.
        """
        query, key = self.query(x, self.heads), self.keys(x)
        if turn is not None:
            query, key = turn(query), turn(key)
        return attention_margins(query, key, prefix)


def _parts(module: nn.Module) -> Iterator[str]:
    """Names of what a module holds itself and that does something."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter is not None:
            yield name
    for name, child in module.named_children():
        if not isinstance(child, nn.Identity):
            yield name


def _norm(attention: nn.Module, *names: str) -> nn.Module | None:
    for name in names:
        norm = getattr(attention, name, None)
        if norm is not None and not isinstance(norm, nn.Identity):
            found: nn.Module = norm
            return found
    return None


def _biases(bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Of queries and of keys, from the bias of all three."""
    if bias is None:
        return None, None
    query, key, _ = bias.chunk(3)
    return query, key


def _plain(linear: nn.Module) -> nn.Linear:
    """Weights of subclasses (quantised, with adapters) are not all that they apply."""
    if type(linear) is not nn.Linear:
        raise UnsupportedError(
            f"attention is read through weights of nn.Linear, which {type(linear).__name__} may "
            "not apply as they are; merge adapters, or read the tower before it is quantised"
        )
    return linear


def _linear(linear: nn.Module, norm: nn.Module | None) -> Linear:
    plain = _plain(linear)
    return Linear(plain.weight, plain.bias, norm)
