"""Consistency of two importances: overlap and rank correlation, equations 5 to 8 of VTC-CLS.

The paper (arXiv:2412.05819, section 3.2) compares the scores of a vision tower with the attention
that the output tokens pay to visual tokens in each layer of the LLM. Both functions take any
leading axes and broadcast them, so one call compares the tower with all layers:

    overlap(vision[:, None], llm, keep=64)    # (batch, 1, tokens), (batch, layers, tokens)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..budget import Keep
from ..errors import BudgetError, ScoreError, ShapeError


def overlap(first: Tensor, second: Tensor, keep: int | float, mask: Tensor | None = None) -> Tensor:
    """The share of kept tokens that both scores would keep, `(...)` float64 in [0, 1].

    Unrelated scores share `keep / tokens` on average. Ties go to the lower place, as in eviction.

    Args:
        first: `(..., tokens)` scores, higher = keep.
        second: `(..., tokens)` others; leading axes broadcast.
        keep: tokens that stay of a row: int = count, float = fraction.
        mask: `(..., tokens)` bool, False where a row is padded; None where none is.

    Returns:
        The proportion p of equation 6; NaN for rows that keep nothing since they hold nothing.

    Raises:
        BudgetError: `keep` is no budget, or zero.
        ScoreError: a score is NaN.
        ShapeError: shapes do not go together.

    >>> overlap(torch.tensor([4.0, 3, 2, 1]), torch.tensor([9.0, 0, 8, 7]), keep=2)
    tensor(0.5000, dtype=torch.float64)
    """
    first, second, real = _checked(first, second, mask)
    budget = Keep(keep)
    if budget.amount == 0:
        raise BudgetError("an overlap needs at least one token to keep, got keep=0")
    counts = _counts(budget, real)
    both = _kept(first, real, counts) & _kept(second, real, counts)
    return both.sum(-1).double() / counts


def rank_correlation(first: Tensor, second: Tensor, mask: Tensor | None = None) -> Tensor:
    """Spearman's correlation of two scores, `(...)` float64 in [-1, 1].

    Equal scores share the mean of their ranks. Unrelated scores have 0 on average.

    Args:
        first: `(..., tokens)` scores.
        second: `(..., tokens)` others; leading axes broadcast.
        mask: `(..., tokens)` bool, False where a row is padded; None where none is.

    Returns:
        The coefficient c of equation 8; NaN where all scores of a row are equal or there are fewer
        than two, which leaves it undefined.

    Raises:
        ScoreError: a score is NaN.
        ShapeError: shapes do not go together.

    >>> rank_correlation(torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 4, 9])).round(decimals=9)
    tensor(1., dtype=torch.float64)
    """
    first, second, real = _checked(first, second, mask)
    one, other = _centred(ranks(first, real), real), _centred(ranks(second, real), real)
    spread = one.square().sum(-1).sqrt() * other.square().sum(-1).sqrt()
    return ((one * other).sum(-1) / spread).clamp(-1, 1)


def ranks(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Ranks from 1 for the lowest score; ties share their mean. `(..., tokens)` float64.

    Padding has rank 0.

    >>> ranks(torch.tensor([0.3, 0.1, 0.3]))
    tensor([2.5000, 1.0000, 2.5000], dtype=torch.float64)
    """
    scores, _, real = _checked(scores, scores, mask)
    ascending = scores.masked_fill(~real, torch.inf).sort(-1).values
    scores = scores.contiguous()
    below = torch.searchsorted(ascending, scores, right=False)
    up_to = torch.searchsorted(ascending, scores, right=True)
    # Padding ties with scores of inf, which are legal; it stands behind them.
    up_to = torch.minimum(up_to, real.sum(-1, keepdim=True))
    return ((below + up_to + 1).double() / 2).masked_fill(~real, 0)


def _checked(first: Tensor, second: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Both scores and which are real, all of one shape; padding cannot matter."""
    given = [first, second] if mask is None else [first, second, mask]
    shapes = ", ".join(str(tuple(each.shape)) for each in given)
    if any(each.ndim == 0 for each in given) or len({each.shape[-1] for each in given}) > 1:
        raise ShapeError(
            f"scores and mask must have axes (..., tokens) of one length, got {shapes}"
        )
    if mask is not None and mask.dtype != torch.bool:
        raise ShapeError(f"mask must be bool, got {mask.dtype}")
    try:
        shape = torch.broadcast_shapes(*(each.shape for each in given))  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise ShapeError(f"leading axes must broadcast, got {shapes}") from None
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device=first.device)
    real = mask.expand(shape)
    first, second = (
        each.expand(shape).double().masked_fill(~real, -torch.inf) for each in (first, second)
    )
    if bool((first.isnan() | second.isnan()).any()):
        raise ScoreError("scores to compare must not be NaN; -inf and inf are fine")
    return first, second, real


def _counts(budget: Keep, real: Tensor) -> Tensor:
    """Tokens that stay of each row, `(...)`."""
    lengths = real.sum(-1)
    kept = [budget.count(length) for length in lengths.flatten().tolist()]
    return torch.tensor(kept, device=real.device).reshape(lengths.shape)


def _kept(scores: Tensor, real: Tensor, counts: Tensor) -> Tensor:
    """The best `counts` of each row, `(..., tokens)` bool; padding comes last, even after -inf."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    padding_last = real.logical_not().gather(-1, order).to(torch.uint8)
    order = order.gather(-1, padding_last.argsort(dim=-1, stable=True))
    best = torch.arange(order.shape[-1], device=order.device) < counts[..., None]
    return torch.zeros_like(real).scatter(-1, order, best)


def _centred(ranked: Tensor, real: Tensor) -> Tensor:
    mean = ranked.sum(-1, keepdim=True) / real.sum(-1, keepdim=True)
    return (ranked - mean).masked_fill(~real, 0)
