"""Scorers against their formulas in float64, one picture at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from reference.cases import KINDS, features
from tokenprune import (
    AlignedFeatures,
    ClsAttention,
    ClsAttentionScorer,
    Evict,
    FoPruScorer,
    GivenAttention,
    PoolAttention,
    PoolAttentionScorer,
    RandomScorer,
    ReceivedAttention,
    ReceivedAttentionScorer,
    RelevanceScorer,
    Scorer,
    Signal,
    Signals,
    SimilarityScorer,
    TextFeatures,
    UniformScorer,
    VisualTokens,
)

TOKENS = [1, 2, 9, 16]


def score(scorer: Scorer, x: Tensor, signals: dict[Signal, Tensor] | None = None) -> np.ndarray:
    """Scores of one picture, the same alone and padded on both sides beside another."""
    signals = signals or {}
    tokens = x.shape[0]
    alone = scorer.score(VisualTokens.of(x[None]), Signals(signals))
    width = tokens + 3
    slots = torch.arange(1, tokens + 1)
    rows = torch.full((2, width, x.shape[1]), torch.nan, dtype=x.dtype)
    rows[0] = features("normal", width, 1)[:, : x.shape[1]].to(x.dtype)
    rows[1, slots] = x
    mask = torch.zeros(2, width, dtype=torch.bool)
    mask[0], mask[1, slots] = True, True
    patches = torch.arange(width).repeat(2, 1)
    patches[1, slots] = torch.arange(tokens)
    spread: dict[Signal, Tensor] = {}
    for signal, answer in signals.items():
        axes = signal.axes.split()
        if "tokens" not in axes:
            spread[signal] = answer.expand(2, *answer.shape[1:])
            continue
        axis = axes.index("tokens")
        shape = [2, *(width if i == axis else n for i, n in enumerate(answer.shape) if i)]
        spread[signal] = answer.new_full(shape, torch.nan)
        spread[signal][0] = 0.1
        spread[signal][1] = spread[signal][1].index_copy(axis - 1, slots, answer[0])
    among = scorer.score(VisualTokens.of(rows, mask=mask, patches=patches), Signals(spread))
    assert alone.dtype == among.dtype == torch.float32
    assert torch.equal(alone[0], among[1, slots])
    return alone[0].double().numpy()


def attention(tokens: int, layers: int, seed: int = 0) -> Tensor:
    """`(layers, heads, queries, keys)` float64 of a tower with [CLS] first."""
    generator = torch.Generator().manual_seed(seed)
    shape = (layers, 4, tokens + 1, tokens + 1)
    return (torch.randn(shape, generator=generator).double() * 2).softmax(-1)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("ensemble", ["avg", "max", "min"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cls_attention(tokens: int, ensemble: str, dtype: torch.dtype) -> None:
    rows = attention(tokens, 3)[:, :, 0, 1:].to(dtype)
    how = {"avg": np.mean, "max": np.max, "min": np.min}[ensemble]
    expected = how(rows.double().numpy().mean(1), axis=0)
    got = score(
        ClsAttentionScorer(ensemble=ensemble),
        features("normal", tokens, 0),
        {ClsAttention(3): rows[None]},
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_with_one_layer_the_ensembles_are_one_and_that_is_fastervlm() -> None:
    rows = attention(9, 1)[:, :, 0, 1:].float()
    given = {ClsAttention(1): rows[None]}
    x = features("normal", 9, 0)
    scores = [score(ClsAttentionScorer(1, how), x, given) for how in ("avg", "max", "min")]
    assert (scores[0] == scores[1]).all()
    assert (scores[0] == scores[2]).all()
    assert scores[0].sum() <= 1


def test_sum_and_mean_over_layers_keep_the_same_tokens() -> None:
    rows = attention(64, 3)[:, :, 0, 1:].float()
    tokens = VisualTokens.of(torch.randn(1, 64, 4))
    mean = ClsAttentionScorer().score(tokens, Signals({ClsAttention(3): rows[None]}))
    total = rows.mean(1).sum(0)[None]
    for keep in (1, 8, 40):
        kept = [Evict(keep).plan(tokens, s, Signals()).anchors for s in (mean, total)]
        assert torch.equal(*kept)


@pytest.mark.parametrize("tokens", TOKENS)
def test_received_attention(tokens: int) -> None:
    matrix = attention(tokens, 2)
    received = matrix[:, :, 1:, 1:].mean(2)
    got = score(
        ReceivedAttentionScorer(2),
        features("normal", tokens, 0),
        {ReceivedAttention(2): received.float()[None]},
    )
    np.testing.assert_allclose(got, matrix[:, :, 1:, 1:].numpy().mean((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize("tokens", TOKENS)
def test_pool_attention(tokens: int) -> None:
    probe = attention(tokens, 1)[0, :, 0, 1:].float()
    got = score(
        PoolAttentionScorer(), features("normal", tokens, 0), {PoolAttention(): probe[None]}
    )
    np.testing.assert_allclose(got, probe.double().numpy().mean(0), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("pivots", [1, 4])
def test_similarity(kind: str, tokens: int, pivots: int) -> None:
    x = features(kind, tokens, tokens)
    got = score(SimilarityScorer(pivots), x)
    plain = x.double().numpy()
    norms = [np.float32(math.sqrt(row @ row)) for row in plain]
    chosen = [n >= sorted(norms)[-min(pivots, tokens)] for n in norms]
    for i in range(tokens):
        if chosen[i]:
            assert got[i] == 3
            continue
        lengths = [norms[i] * norms[j] for j in range(tokens)]
        likeness = [
            plain[i] @ plain[j] / lengths[j] if lengths[j] else 0
            for j in range(tokens)
            if chosen[j]
        ]
        assert got[i] == pytest.approx(1 - max(likeness), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("negate", [False, True])
def test_relevance(kind: str, tokens: int, negate: bool) -> None:
    aligned = features(kind, tokens, 4)
    texts = torch.cat([features("normal", 3, 5), torch.zeros(2, aligned.shape[1])])
    texts = texts.to(aligned.dtype)
    got = score(
        RelevanceScorer(negate),
        features("normal", tokens, 0),
        {AlignedFeatures(): aligned[None], TextFeatures(): texts[None]},
    )
    a, t = aligned.double().numpy(), texts[:3].double().numpy()
    mean = np.array(
        [
            np.mean(
                [
                    v @ w / (np.linalg.norm(v) * np.linalg.norm(w)) if np.linalg.norm(v) else 0.0
                    for w in t
                ]
            )
            for v in a
        ]
    )
    mean = -mean if negate else mean
    span = mean.max() - mean.min()
    expected = (mean - mean.min()) / (span if span > 1e-6 else 1)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("mode", ["rank", "row"])
@pytest.mark.parametrize("calm", [False, True])
def test_fopru(tokens: int, mode: str, calm: bool) -> None:
    matrix = attention(tokens, 1)[0].mean(0)[1:, 1:].numpy()
    if calm:  # every token receives as much, and they give different amounts
        matrix = np.linspace(0.1, 1, tokens)[:, None].repeat(tokens, 1)
    received, given = matrix.mean(0), matrix.mean(1)
    chosen = given if received.var() < given.var() * (1 - 1e-9) else received
    if mode == "row":
        side = math.ceil(math.sqrt(tokens))
        rows = [chosen[i - i % side : i - i % side + side] for i in range(tokens)]
        chosen = np.array([row.mean() for row in rows])
    margins = {
        ReceivedAttention(1): torch.tensor(received)[None, None, None].float(),
        GivenAttention(1): torch.tensor(given)[None, None, None].float(),
    }
    got = score(FoPruScorer(mode), features("normal", tokens, 0), margins)
    np.testing.assert_allclose(got, chosen, rtol=1e-5)


@pytest.mark.parametrize(("step", "chosen"), [(0.19, "received"), (0.21, "given")])
def test_fopru_compares_variances_whatever_the_means_and_the_padding(
    step: float, chosen: str
) -> None:
    x = VisualTokens.of(
        torch.zeros(2, 4, 1), mask=torch.tensor([[True, True, False, False], [True] * 4])
    )
    # Row 1 always prefers what is given; row 0 only if it varies more, at a much higher mean.
    margins = {
        "received": torch.tensor([[0.1, 0.3, 9.0, -9.0], [0.2, 0.2, 0.2, 0.2]]),
        "given": torch.tensor([[7.0, 7.0 + step, 7.0, 7.0], [0.1, 0.2, 0.3, 0.4]]),
    }
    received, given = (margins[name][:, None, None] for name in ("received", "given"))
    signals = Signals({ReceivedAttention(1): received, GivenAttention(1): given})
    got = FoPruScorer().score(x, signals)
    assert torch.equal(got[0, :2], margins[chosen][0, :2])
    assert torch.equal(got[1], margins["given"][1])


@pytest.mark.parametrize("more", [0.0, 1e-10])
def test_fopru_takes_what_is_received_where_margins_vary_alike(more: float) -> None:
    """By more than rounding must what is given vary, or the last digits would decide."""
    received = torch.tensor([0.25, 0.5, 0.0, 0.75])
    given = received.flip(0) * (1 + more)
    signals = Signals(
        {
            ReceivedAttention(1): received[None, None, None],
            GivenAttention(1): given[None, None, None],
        }
    )
    tokens = VisualTokens.of(torch.zeros(1, 4, 1))
    assert FoPruScorer().score(tokens, signals).tolist() == [received.tolist()]


def test_fopru_with_one_column_ranks_single_tokens() -> None:
    margins = torch.rand(1, 1, 1, 9, generator=torch.Generator().manual_seed(0))
    signals = Signals({ReceivedAttention(1): margins, GivenAttention(1): margins * 0})
    tokens = VisualTokens.of(torch.zeros(1, 9, 1))
    assert torch.equal(FoPruScorer("row", columns=1).score(tokens, signals), margins[:, 0, 0])


def test_fopru_keeps_whole_rows_of_the_grid() -> None:
    margins = torch.rand(1, 1, 2, 30, generator=torch.Generator().manual_seed(0))
    signals = Signals({ReceivedAttention(1): margins, GivenAttention(1): margins * 0})
    tokens = VisualTokens.of(torch.randn(1, 30, 4))
    scores = FoPruScorer("row", columns=6).score(tokens, signals)
    kept = Evict(12).plan(tokens, scores, signals).anchors[0].reshape(2, 6)
    assert (kept // 6 == kept[:, :1] // 6).all()
    best = margins[0, 0].mean(0).reshape(5, 6).mean(1).topk(2).indices
    assert set((kept[:, 0] // 6).tolist()) == set(best.tolist())


def test_random_scores_belong_to_the_picture_not_to_the_batch() -> None:
    x = torch.randn(3, 50, 2)
    ids = torch.tensor([11, 22, 11])
    scores = RandomScorer(seed=4).score(VisualTokens.of(x, ids=ids), Signals())
    assert torch.equal(scores[0], scores[2])
    assert not torch.equal(scores[0], scores[1])
    alone = RandomScorer(seed=4).score(VisualTokens.of(x[1:2], ids=ids[1:2]), Signals())
    assert torch.equal(alone[0], scores[1])
    assert ((scores >= 0) & (scores < 1)).all()
    other = RandomScorer(seed=5).score(VisualTokens.of(x, ids=ids), Signals())
    assert not torch.equal(other, scores)


def test_random_scores_look_uniform_and_independent_of_the_seed() -> None:
    tokens = VisualTokens.of(torch.zeros(1, 20_000, 1))
    first, second = (RandomScorer(seed).score(tokens, Signals())[0] for seed in (0, 1))
    counts = torch.histc(first, 20, 0, 1)
    assert ((counts - 1000).abs() < 5 * 1000**0.5).all()
    assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.03
    assert torch.corrcoef(torch.stack([first[1:], first[:-1]]))[0, 1].abs() < 0.03


@pytest.mark.parametrize("tokens", [1, 2, 7, 64, 100])
def test_uniform_spreads_and_every_power_of_two_is_a_stride(tokens: int) -> None:
    given = VisualTokens.of(torch.zeros(1, tokens, 1))
    scores = UniformScorer().score(given, Signals())
    assert len(set(scores[0].tolist())) == tokens
    keep = 1
    while keep <= tokens:
        kept = Evict(keep).plan(given, scores, Signals()).anchors[0].tolist()
        assert kept == sorted({i * tokens // keep for i in range(keep)})
        keep *= 2
