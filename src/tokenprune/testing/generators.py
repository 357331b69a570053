"""Hypothesis strategies for what goes through tokenprune.

They draw on purpose what random tensors never hold and real batches do: duplicates, zeros of both
signs, ties, rows of one token, padding on either side or in between (with junk in it), protected
tokens, sizes above one, and magnitudes up to where a square still fits into the dtype. Everything
shrinks towards one row of one zero token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias, TypeVar

import torch
from einops import rearrange
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from ..plan import Plan
from ..signals import (
    ClsAttention,
    GivenAttention,
    JointClsAttention,
    LastQueryAttention,
    PoolAttention,
    ReceivedAttention,
    Signal,
    Signals,
    TextQueryAttention,
)
from ..strategy import Reducer, Scorer, Strategy
from ..tokens import VisualTokens
from .inputs import Inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Drawn: TypeAlias = SearchStrategy[Tensor]
T = TypeVar("T")
SignalStrategy: TypeAlias = Callable[[Signal, VisualTokens], Drawn]

_PALETTE = (0.0, 1.0, -1.0, 2.0, 0.5, -3.0, -0.0, -0.25)
# Powers of two keep ties, and exponents that a sum of squares in float32 survives.
# An outlier times a scale must still be a number in float16.
_SCALES = {torch.float16: (1.0, 2.0**4, 2.0**-10)}
_SCALES_FLOAT32 = (1.0, 2.0**40, 2.0**-40)
_JUNK = st.sampled_from((0.0, 1e4, torch.nan, torch.inf, -torch.inf))
_BOTH = st.booleans()

_between = cache(st.integers)
_one_of = cache(st.sampled_from)


@cache
def _choices(count: int, options: tuple[T, ...] | range) -> SearchStrategy[list[Any]]:
    """`count` of `options`. Bytes are much faster than lists, and shrink as well.

    Kept, like every strategy here that is drawn from often: hypothesis looks at each anew.
    """
    chosen = st.binary(min_size=count, max_size=count)
    return chosen.map(lambda drawn: [options[byte % len(options)] for byte in drawn])


@st.composite
def values(draw: DrawFn, rows: int, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`(rows, channels)` with duplicates, zeros, and now and then extreme magnitudes."""
    vectors = draw(_choices(draw(_between(1, 4)) * channels, _PALETTE))
    palette = torch.tensor([*[0.0] * channels, *vectors]).reshape(-1, channels)
    x = palette[draw(_choices(rows, range(len(palette))))]
    if draw(_BOTH):  # no two alike
        generator = torch.Generator().manual_seed(draw(_between(0, 2**16)))
        x = x + torch.randn(rows, channels, generator=generator)
    if draw(_between(0, 3)) == 3:  # an outlier, as towers really have them
        x[draw(_between(0, rows - 1))] *= 2.0**8
    if draw(_between(0, 3)) == 3:
        x = x * draw(_one_of(_SCALES.get(dtype, _SCALES_FLOAT32)))
    return x.to(dtype)


@st.composite
def visual_tokens(
    draw: DrawFn,
    *,
    min_batch: int = 1,
    max_batch: int = 3,
    max_tokens: int = 9,
    dtypes: Sequence[torch.dtype] = DTYPES,
    padding: bool = True,
    protected: bool = True,
    sizes: bool = True,
) -> VisualTokens:
    """Batches of visual tokens.

    Args:
        draw: given by hypothesis.
        min_batch: fewest rows.
        max_batch: most rows.
        max_tokens: most real tokens of a row; the fewest is 1.
        dtypes: dtypes of the features.
        padding: whether rows may be padded: left, right, or in between.
        protected: whether tokens may be protected.
        sizes: whether tokens may stand for more than one.
    """
    batch = draw(_between(min_batch, max_batch))
    if padding:
        lengths = draw(_choices(batch, range(1, max_tokens + 1)))
        width = max(lengths) + draw(_between(0, 2))
        side = draw(_one_of(("right", "left", "between")))
    else:
        width = draw(_between(1, max_tokens))
        lengths, side = [width] * batch, "right"
    mask = torch.zeros(batch, width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        place = list(range(width)) if side == "right" else list(range(width))[::-1]
        if side == "between":
            place = draw(_choices(width, range(256)))
        mask[row, sorted(range(width), key=place.__getitem__)[:length]] = True

    channels = draw(_between(1, 4))
    features = draw(values(batch * width, channels, draw(_one_of(tuple(dtypes)))))
    features = features.reshape(batch, width, channels)
    features = features.masked_fill(~mask[:, :, None], draw(_JUNK))
    gaps = draw(_one_of((1, 1, 3)))
    first = draw(_one_of((0, 0, 35)))
    return VisualTokens.of(
        features,
        mask=mask,
        patches=((mask.cumsum(1) - 1).clamp(min=0) * gaps + first).masked_fill(~mask, 0),
        sizes=_marks(draw, mask, (1.0, 1.0, 2.0, 7.0)) if sizes and draw(_between(0, 2)) else None,
        protected=_marks(draw, mask, (False, False, True)) if protected and draw(_BOTH) else None,
        ids=torch.tensor(draw(_choices(batch, range(4)))),
    )


def _marks(draw: DrawFn, mask: Tensor, options: tuple[float, ...] | range) -> Tensor:
    return torch.tensor(draw(_choices(mask.numel(), options))).reshape(mask.shape)


def budgets(max_tokens: int = 11) -> SearchStrategy[int | float]:
    """What may be given as `keep`: counts from 1, also above any row, and fractions up to 1.0."""
    fractions = st.sampled_from((0.1, 0.25, 1 / 3, 0.5, 0.75, 0.9, 1.0))
    few = st.integers(1, min(4, max_tokens))
    return st.one_of(few, fractions, st.integers(1, max_tokens))


@st.composite
def scores_for(draw: DrawFn, tokens: VisualTokens, *, infinite: bool = False) -> Tensor:
    """`(batch, tokens)` float32 scores with ties; on padding they hold anything, NaN included.

    Args:
        draw: given by hypothesis.
        tokens: what is scored.
        infinite: whether real tokens may score +inf (must stay) and -inf (goes first).
    """
    batch, width = tokens.mask.shape
    scores = draw(values(batch * width, 1)).reshape(batch, width)
    if infinite and draw(_BOTH):
        endless = _marks(draw, tokens.mask, (0.0, 0.0, torch.inf, -torch.inf))
        # Rows beside each other: finite, mixed, and one that nobody wants to keep.
        kinds = torch.tensor(draw(_choices(batch, range(4))))[:, None]
        endless = endless.masked_fill(kinds == 1, 0).masked_fill(kinds == 3, -torch.inf)
        scores = scores + endless
    junk: float = draw(_JUNK)
    return scores.masked_fill(~tokens.mask, junk)


@st.composite
def plans(draw: DrawFn, tokens: VisualTokens | None = None) -> Plan:
    """Valid plans: selections and merges, of a different number of tokens per row.

    Args:
        draw: given by hypothesis.
        tokens: what the plan is for; drawn where it is None.
    """
    tokens = draw(visual_tokens()) if tokens is None else tokens
    mask, width = tokens.mask, tokens.mask.shape[1]
    groups = _marks(draw, mask, range(-1, 4))
    # Every row keeps something: its first real token joins a group.
    groups.scatter_(1, mask.to(torch.uint8).argmax(1, keepdim=True), 0)
    groups = groups.masked_fill(~mask, -1).clamp(max=width - 1)
    if draw(_BOTH):
        return Plan.select(groups >= 0)
    return Plan.group(groups, tokens.sizes)


_registered: dict[type[Signal], SignalStrategy] = {}


def register_signal(kind: type[Signal], strategy: SignalStrategy) -> None:
    """Say how answers to a kind of signal are drawn, where any real numbers will not do.

    Args:
        kind: the class; its subclasses are drawn alike.
        strategy: function from a signal and the visual tokens to a hypothesis strategy of tensors
            with the axes of the signal. `real_numbers` and `attention_rows` are two to start from.
    """
    _registered[kind] = strategy


@st.composite
def real_numbers(draw: DrawFn, signal: Signal, tokens: VisualTokens) -> Tensor:
    """Any real numbers with the axes of `signal`: what is drawn for signals nobody registered."""
    names = signal.axes.split()
    sizes = {name: _size(draw, name, signal, tokens) for name in names}
    rows = [name for name in names if name in ("batch", "tokens")]
    rest = [name for name in names if name not in rows]
    count = int(torch.tensor([sizes[name] for name in rows]).prod())
    width = int(torch.tensor([sizes[name] for name in rest]).prod())
    drawn = draw(values(count, width, draw(_one_of(DTYPES))))
    packed = f"({' '.join(rows)}) ({' '.join(rest)}) -> {signal.axes}"
    return rearrange(drawn, packed, **sizes)


@st.composite
def attention_rows(draw: DrawFn, signal: Signal, tokens: VisualTokens) -> Tensor:
    """Rows of a softmax over more keys than the visual tokens: in [0, 1], sums at most 1."""
    names = signal.axes.split()
    axis = names.index("tokens")
    drawn = draw(real_numbers(signal, tokens))
    shape = [n if name in ("batch", "tokens") else 1 for name, n in zip(names, drawn.shape)]  # noqa: B905
    mass = drawn.float().abs().masked_fill(~tokens.mask.reshape(shape), 0)
    # A part of the attention goes elsewhere: to [CLS], to registers, to text.
    elsewhere: float = draw(_one_of((0.0, 1.0, 1e6)))
    total = mass.sum(axis, keepdim=True) * (1 + elsewhere) + torch.finfo(torch.float32).tiny
    return (mass / total).to(drawn.dtype)


def _size(draw: DrawFn, name: str, signal: Signal, tokens: VisualTokens) -> int:
    if name == "batch":
        return int(tokens.mask.shape[0])
    if name == "tokens":
        return int(tokens.mask.shape[1])
    asked = getattr(signal, name, None)  # layers=3, layers=(-2,) ...
    if isinstance(asked, int):
        return asked
    if isinstance(asked, (tuple, list)):
        return len(asked)
    # Axes of one name are as long in all signals that a step reads together.
    return draw(st.shared(st.integers(1, 3), key=f"tokenprune axis {name}"))


for _kind in (
    ClsAttention,
    GivenAttention,
    JointClsAttention,
    LastQueryAttention,
    PoolAttention,
    ReceivedAttention,
    TextQueryAttention,
):
    register_signal(_kind, attention_rows)


@st.composite
def signals_for(draw: DrawFn, step: Scorer | Reducer | Strategy, tokens: VisualTokens) -> Signals:
    """Exactly the signals that `step` declares, for `tokens`; junk where a row is padded.

    Args:
        draw: given by hypothesis.
        step: a scorer, a reducer or a whole strategy.
        tokens: the visual tokens that the signals describe.
    """
    answers = {}
    for signal in sorted(step.signals, key=repr):
        kinds = (kind for kind in type(signal).__mro__ if kind in _registered)
        kind = next(kinds, None)
        strategy = real_numbers if kind is None else _registered[kind]
        answer = draw(strategy(signal, tokens))
        names = signal.axes.split()
        if "tokens" in names and "batch" in names:
            front = "batch tokens " + " ".join(n for n in names if n not in ("batch", "tokens"))
            shown = rearrange(answer, f"{signal.axes} -> {front}")
            padded = ~tokens.mask.reshape(*tokens.mask.shape, *(1,) * (shown.ndim - 2))
            answer = rearrange(shown.masked_fill(padded, draw(_JUNK)), f"{front} -> {signal.axes}")
        answers[signal] = answer
    return Signals(answers)


@st.composite
def inputs_for(
    draw: DrawFn,
    step: Scorer | Reducer | Strategy,
    *,
    min_batch: int = 1,
    dtypes: Sequence[torch.dtype] = DTYPES,
    infinite: bool = False,
) -> Inputs:
    """Tokens, the signals that `step` declares, and scores where it needs them.

    Args:
        draw: given by hypothesis.
        step: a scorer, a reducer or a whole strategy.
        min_batch: fewest rows.
        dtypes: dtypes of the features.
        infinite: whether scores may be infinite.
    """
    tokens = draw(visual_tokens(min_batch=min_batch, dtypes=dtypes))
    signals = draw(signals_for(step, tokens))
    scores = None
    if isinstance(step, Reducer) and step.needs_scores:
        scores = draw(scores_for(tokens, infinite=infinite))
    return Inputs(tokens, signals, scores)


def is_attention(signal: Signal) -> bool:
    """Whether answers to `signal` are rows of attention."""
    kinds = (kind for kind in type(signal).__mro__ if kind in _registered)
    kind = next(kinds, None)
    return kind is not None and _registered[kind] is attention_rows
