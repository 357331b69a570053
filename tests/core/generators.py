"""Hypothesis strategies and small oracles for the tests of the core.

Generators draw duplicates, zeros, extremes, one-token rows and padding at any side on purpose.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from hypothesis import strategies as st
from torch import Tensor

from tokenprune import Keep, Plan, VisualTokens

INF, NAN = float("inf"), float("nan")

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 0.1, -3.0, 1e-4, 300.0, 6e4])
"""Finite in every floating dtype, few enough that duplicates are common."""

SCORES = st.sampled_from([0.0, -0.0, 0.25, 0.5, 0.5, 1.0, -2.0, 1e-30, 3e38, INF, -INF])


def bits(x: Tensor) -> Tensor:
    """The bytes of `x`, so that NaN equals NaN and -0.0 differs from 0.0."""
    return x.contiguous().view(torch.uint8) if x.dtype != torch.bool else x


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


@st.composite
def grids(draw: st.DrawFn, elements: st.SearchStrategy, batch: int, tokens: int) -> list:
    row = st.lists(elements, min_size=tokens, max_size=tokens)
    return draw(st.lists(row, min_size=batch, max_size=batch))


@st.composite
def masks(draw: st.DrawFn, batch: int, tokens: int, *, empty_rows: bool = True) -> Tensor:
    """`(batch, tokens)` bool: nothing, or either side, or anything padded."""
    if draw(st.booleans()):
        return torch.ones(batch, tokens, dtype=torch.bool)
    mask = torch.tensor(draw(grids(st.booleans(), batch, tokens))).reshape(batch, tokens)
    side = draw(st.sampled_from(["left", "right", "interleaved"]))
    if side != "interleaved":
        mask = mask.sort(dim=1, descending=side == "right").values
    if not empty_rows:
        mask[~mask.any(1), 0] = True
    return mask


@st.composite
def visual_tokens(
    draw: st.DrawFn,
    *,
    protected: bool = True,
    padded: bool = True,
    dtypes: tuple[torch.dtype, ...] = FLOATING,
    max_tokens: int = 8,
) -> VisualTokens:
    batch = draw(st.integers(1, 3))
    tokens = draw(st.integers(1, max_tokens))
    channels = draw(st.integers(1, 3))
    grid = draw(grids(st.tuples(*[VALUES] * channels), batch, tokens))
    features = torch.tensor(grid, dtype=torch.float64).reshape(batch, tokens, channels)
    guarded = grids(st.sampled_from([False, False, True]), batch, tokens)
    return VisualTokens.of(
        features.to(draw(st.sampled_from(dtypes))),
        mask=draw(masks(batch, tokens)) if padded else None,
        protected=torch.tensor(draw(guarded)).reshape(batch, tokens) if protected else None,
        sizes=torch.tensor(draw(grids(st.sampled_from([1.0, 1.0, 2.0, 7.0]), batch, tokens))),
        ids=torch.tensor(draw(st.lists(st.integers(-9, 9), min_size=batch, max_size=batch))),
    )


@st.composite
def scored_tokens(
    draw: st.DrawFn, *, protected: bool = True, padded: bool = True
) -> tuple[VisualTokens, Tensor]:
    """Visual tokens and legal scores: ties and infinities on purpose, NaN on padding alone."""
    tokens = draw(visual_tokens(protected=protected, padded=padded))
    scores = torch.tensor(draw(grids(SCORES, *tokens.mask.shape)), dtype=torch.float32)
    if draw(st.booleans()):
        scores = scores.masked_fill(~tokens.mask, NAN)
    return tokens, scores


@st.composite
def groupings(draw: st.DrawFn, tokens: VisualTokens) -> Tensor:
    """`(batch, tokens)` int64 group numbers, -1 on padding and on what is dropped."""
    batch, count = tokens.mask.shape
    numbers = torch.tensor(draw(grids(st.integers(-1, count - 1), batch, count)))
    return numbers.masked_fill(~tokens.mask, -1)


@st.composite
def plans(draw: st.DrawFn, tokens: VisualTokens) -> Plan:
    """A selection of the real tokens, groups of them, or memberships in several kept tokens."""
    groups = draw(groupings(tokens))
    kind = draw(st.sampled_from(["select", "group", "share"]))
    if kind == "group":
        return Plan.group(groups, tokens.sizes)
    kept = Plan.select(groups >= 0)
    if kind == "select":
        return kept
    return shared(kept, tokens.mask, draw(st.integers(0, 99)))


def shared(kept: Plan, mask: Tensor, seed: int) -> Plan:
    """A plan with the tokens of `kept`, each of which has some of a few others, too."""
    generator = torch.Generator().manual_seed(seed)
    own = kept.dense()
    others = torch.rand(own.shape, generator=generator)
    others = others * (torch.rand(own.shape, generator=generator) > 0.7)
    real = mask[:, None, :] & kept.mask[:, :, None]
    return Plan.of_weights(kept.anchors, kept.mask, own + others * real)


@st.composite
def budgets(draw: st.DrawFn) -> Keep:
    counts = st.integers(0, 10)
    fractions = st.sampled_from([1e-9, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.7, 0.75, 0.999, 1.0])
    return Keep(draw(counts | fractions))


def kept_count(amount: float | int, tokens: int) -> int:
    """What `Keep` promises, in exact arithmetic: half up, at least one for a fraction."""
    if isinstance(amount, int):
        return min(amount, tokens)
    exact = Fraction(repr(amount)) * tokens
    return min(max((2 * exact + 1) // 2, 1), tokens)


def kept_slots(
    scores: list[float], mask: list[bool], protected: list[bool], amount: float | int
) -> list[int]:
    """Eviction of one row as a plain loop: best first, lowest index on ties, raster order."""
    real = [slot for slot in range(len(mask)) if mask[slot]]
    guarded = sum(protected[slot] for slot in real)
    count = max(kept_count(amount, len(real)), guarded)
    ranked = sorted(real, key=lambda slot: (not protected[slot], -scores[slot], slot))
    return sorted(ranked[:count])


def slots_of(plan: Plan, row: int) -> list[int]:
    """The anchors of one row, without filling."""
    return plan.anchors[row][plan.mask[row]].tolist()
