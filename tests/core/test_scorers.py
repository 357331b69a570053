"""The built-in scorers against their papers, in float64 loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from core.generators import kept_slots, masks, same_bits
from tokenprune import (
    ClsAttention,
    ClsAttentionScorer,
    RandomScorer,
    Signals,
    SpecError,
    UniformScorer,
    VisualTokens,
)

ENSEMBLES = ("avg", "max", "min")


def scores_of(rows: Tensor, ensemble: str = "avg") -> Tensor:
    layers = rows.shape[1]
    tokens = VisualTokens.of(torch.zeros(len(rows), rows.shape[3], 1))
    scorer = ClsAttentionScorer(layers, ensemble)  # type: ignore[arg-type]
    return scorer.score(tokens, Signals({ClsAttention(layers): rows}))


@st.composite
def attention_rows(draw: st.DrawFn) -> Tensor:
    """Rows of a softmax over [CLS] and the patches, with the [CLS] column left out."""
    shape = tuple(draw(st.tuples(*[st.integers(1, 4)] * 3, st.integers(1, 9))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    spread = draw(st.sampled_from([0.0, 0.5, 2.0, 6.0]))  # 0: all equal; 6: underflows in fp16
    logits = torch.randn(*shape[:3], shape[3] + 1, generator=generator) * spread
    return logits.softmax(-1)[..., 1:].to(draw(st.sampled_from([torch.float32] * 2 + HALF)))


HALF = [torch.float16, torch.bfloat16]


def by_the_paper(rows: Tensor, ensemble: str) -> list[list[float]]:
    """VTC-CLS (arXiv 2412.05819): eq. 2 is the mean over heads, eq. 9 the ensemble of layers."""
    batch, layers, heads, tokens = rows.shape
    numbers = rows.double().tolist()
    how = {"avg": lambda s: sum(s) / len(s), "max": max, "min": min}[ensemble]
    scores = []
    for image in range(batch):
        row = []
        for token in range(tokens):
            per_layer = [
                sum(numbers[image][layer][head][token] for head in range(heads)) / heads
                for layer in range(layers)
            ]
            row.append(how(per_layer))
        scores.append(row)
    return scores


# ----------------------------------------------------------------------------- cls-attention


@pytest.mark.parametrize("ensemble", ENSEMBLES)
@given(rows=attention_rows())
def test_cls_attention_is_the_papers_formula(ensemble: str, rows: Tensor) -> None:
    scores = scores_of(rows, ensemble)
    assert scores.dtype == torch.float32
    expected = torch.tensor(by_the_paper(rows, ensemble), dtype=torch.float64)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-6, atol=1e-12)


def test_heads_are_averaged_before_layers_are_ensembled() -> None:
    """The maximum over heads would be another method."""
    rows = torch.tensor([[[[0.9, 0.2], [0.1, 0.2]], [[0.3, 0.4], [0.3, 0.0]]]])
    assert scores_of(rows, "max").tolist() == [pytest.approx([0.5, 0.2])]
    assert scores_of(rows, "min").tolist() == [pytest.approx([0.3, 0.2])]
    assert scores_of(rows, "avg").tolist() == [pytest.approx([0.4, 0.2])]


def test_rows_are_not_renormalised() -> None:
    """A layer that looks at [CLS] itself weighs less in the mean, as in the released code."""
    focused, away = torch.tensor([0.8, 0.1]), torch.tensor([0.01, 0.02])  # sums 0.9 and 0.03
    rows = torch.stack([focused, away])[None, :, None]
    scores = scores_of(rows)[0]
    assert scores.tolist() == pytest.approx([0.405, 0.06])
    renormalised = (focused / focused.sum() + away / away.sum()) / 2
    assert renormalised.tolist() != pytest.approx(scores.tolist(), rel=0.1)


@given(attention_rows())
def test_ensembles_are_ordered(rows: Tensor) -> None:
    low, mean, high = (scores_of(rows, how) for how in ("min", "avg", "max"))
    slack = 1e-6 * high.abs()
    assert (low <= mean + slack).all()
    assert (mean <= high + slack).all()
    assert (low <= high).all()


@given(attention_rows())
def test_one_layer_needs_no_ensemble(rows: Tensor) -> None:
    one = rows[:, :1]
    assert same_bits(scores_of(one, "avg"), scores_of(one, "max"))
    assert same_bits(scores_of(one, "avg"), scores_of(one, "min"))


@given(attention_rows(), st.randoms(use_true_random=False))
def test_the_order_of_layers_does_not_matter(rows: Tensor, random: object) -> None:
    order = list(range(rows.shape[1]))
    random.shuffle(order)  # type: ignore[attr-defined]
    for how in ENSEMBLES:
        torch.testing.assert_close(scores_of(rows[:, order], how), scores_of(rows, how))


@given(attention_rows())
def test_a_row_is_alone_in_its_batch(rows: Tensor) -> None:
    together = scores_of(rows)
    for image in range(len(rows)):
        assert same_bits(scores_of(rows[image : image + 1]), together[image : image + 1])


def test_half_precision_rows_are_averaged_in_float32() -> None:
    """In bfloat16 the mean of these heads would lose a third of them."""
    rows = torch.tensor([1.0, 2**-9, 2**-9]).bfloat16().reshape(1, 1, 3, 1)
    assert scores_of(rows).item() == pytest.approx((1 + 2**-8) / 3, rel=1e-6)
    assert rows.mean(2).float().item() != pytest.approx((1 + 2**-8) / 3, rel=1e-3)


def test_explicit_layers_are_asked_for_as_they_were_written() -> None:
    assert ClsAttentionScorer((-4, 3)).signals == {ClsAttention((-4, 3))}
    assert ClsAttentionScorer(5).signals == {ClsAttention(5)}
    assert ClsAttentionScorer([1, 2]) == ClsAttentionScorer((1, 2))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------- random


def random_scores(
    ids: list[int], count: int = 16, seed: int = 0, mask: Tensor | None = None, **fields: Tensor
) -> Tensor:
    tokens = VisualTokens.of(
        torch.zeros(len(ids), count, 1), ids=torch.tensor(ids), mask=mask, **fields
    )
    return RandomScorer(seed).score(tokens, Signals())


IDS = st.integers(-(2**63), 2**63 - 1)
SEEDS = st.integers(0, 2**70)


@given(st.lists(IDS, min_size=1, max_size=5), SEEDS, st.data())
def test_a_picture_scores_the_same_in_any_company(
    ids: list[int], seed: int, data: st.DataObject
) -> None:
    together = random_scores(ids, seed=seed)
    assert together.dtype == torch.float32
    order = data.draw(st.permutations(range(len(ids))))
    permuted = random_scores([ids[i] for i in order], seed=seed)
    for place, i in enumerate(order):
        assert same_bits(random_scores([ids[i]], seed=seed)[0], together[i])
        assert same_bits(permuted[place], together[i])


@given(IDS, SEEDS, st.integers(0, 4))
def test_padding_and_earlier_evictions_do_not_matter(ident: int, seed: int, pad: int) -> None:
    """Scores belong to patches, not to slots."""
    alone = random_scores([ident], 8, seed)
    slots = torch.arange(8 + pad) - pad
    padded = random_scores(
        [ident], 8 + pad, seed, mask=slots[None] >= 0, patches=slots.clamp(min=0)[None]
    )
    assert same_bits(padded[:, pad:], alone)
    some = random_scores([ident], 3, seed, patches=torch.tensor([[1, 4, 7]]))
    assert same_bits(some, alone[:, [1, 4, 7]])


@given(IDS, IDS, SEEDS, SEEDS)
def test_other_pictures_and_seeds_score_otherwise(a: int, b: int, one: int, other: int) -> None:
    assert (a == b) == torch.equal(random_scores([a], seed=one), random_scores([b], seed=one))
    if one % 2**63 != other % 2**63:
        assert not torch.equal(random_scores([a], seed=one), random_scores([a], seed=other))


def test_no_global_state_is_read_or_changed() -> None:
    torch.manual_seed(0)
    one = random_scores([5])
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(expected, torch.rand(1))  # our draw took nothing
    assert same_bits(random_scores([5]), one)


def chi_square(values: Tensor, bins: int) -> float:
    counts = torch.histc(values.double(), bins, 0, 1)
    expected = values.numel() / bins
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("ids", [[0], [2**40], list(range(16)), [-(2**63), 2**63 - 1]])
def test_scores_are_uniform(ids: list[int]) -> None:
    """Chi-square with 31 degrees of freedom: above 70 once in 10,000."""
    scores = random_scores(ids, 4096, seed=7)
    assert scores.min() >= 0
    assert scores.max() < 1
    assert chi_square(scores.flatten(), 32) < 70
    assert chi_square((scores * 1024) % 1, 32) < 70  # the lower bits too


def test_scores_are_independent_of_neighbours_seeds_and_pictures() -> None:
    here = random_scores([0], 4096, seed=1) - 0.5
    others = {
        "next token": here.roll(1),
        "next seed": random_scores([0], 4096, seed=2) - 0.5,
        "next picture": random_scores([1], 4096, seed=1) - 0.5,
    }
    for name, other in others.items():
        correlation = float((here * other).mean() * 12)
        assert abs(correlation) < 4 / 64, name  # four standard deviations
    assert chi_square(torch.linspace(0, 1, 4096) ** 2, 32) > 70  # the check can fail


@pytest.mark.parametrize("seed", [-1, 1.0, True, "1", None])
def test_seeds_are_whole_numbers(seed: object) -> None:
    with pytest.raises(SpecError) as caught:
        RandomScorer(seed)  # type: ignore[arg-type]
    assert str(caught.value) == f"seed must be an int >= 0, got {seed!r}"


# ------------------------------------------------------------------------------------ uniform


def uniform_scores(mask: Tensor) -> Tensor:
    tokens = VisualTokens.of(torch.zeros(*mask.shape, 1), mask=mask)
    return UniformScorer().score(tokens, Signals())


def uniformly_kept(tokens: int, keep: int) -> list[int]:
    scores = uniform_scores(torch.ones(1, tokens, dtype=torch.bool))[0].tolist()
    return kept_slots(scores, [True] * tokens, [False] * tokens, keep)


@given(st.integers(1, 700), st.integers(0, 9))
def test_budgets_of_powers_of_two_are_strides(tokens: int, power: int) -> None:
    keep = min(2**power, tokens)
    if keep == 2**power:
        assert uniformly_kept(tokens, keep) == [i * tokens // keep for i in range(keep)]


@given(st.integers(2, 700), st.data())
def test_any_budget_leaves_no_wide_gap(tokens: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, tokens))
    kept = uniformly_kept(tokens, keep)
    assert len(set(kept)) == keep
    below = 1 << (keep.bit_length() - 1)  # the stride of the power of two below is the bound
    gaps = [b - a for a, b in zip([-1, *kept], [*kept, tokens], strict=True)]
    assert max(gaps) <= -(-tokens // below) + 1


def test_every_token_has_a_rank_of_its_own() -> None:
    for tokens in (1, 2, 3, 5, 24, 576):
        scores = uniform_scores(torch.ones(1, tokens, dtype=torch.bool))
        assert len(set(scores.flatten().tolist())) == tokens


@given(st.data())
def test_padding_changes_nothing(data: st.DataObject) -> None:
    mask = data.draw(masks(data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))))
    scores = uniform_scores(mask)
    assert scores.dtype == torch.float32
    for row, real in zip(scores, mask, strict=True):
        alone = uniform_scores(torch.ones(1, int(real.sum()), dtype=torch.bool))[0]
        assert torch.equal(row[real], alone)
        assert (row[~real] == -torch.inf).all()
