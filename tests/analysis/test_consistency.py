"""Overlap and rank correlation against plain loops over lists."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tokenprune import Keep
from tokenprune.analysis.consistency import overlap, rank_correlation, ranks
from tokenprune.errors import BudgetError, ScoreError, ShapeError

# Few values, so that ties are common; infinities are legal scores.
VALUES = st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 0.25, 0.5, 3.0, math.inf])
PAIRS = st.integers(1, 9).flatmap(
    lambda n: st.tuples(
        st.lists(VALUES, min_size=n, max_size=n), st.lists(VALUES, min_size=n, max_size=n)
    )
)
KEEPS = st.one_of(st.integers(1, 10), st.sampled_from([0.1, 0.25, 0.5, 1.0]))


def plain_overlap(first: list[float], second: list[float], keep: int | float) -> float:
    count = Keep(keep).count(len(first))

    def best(scores: list[float]) -> set[int]:
        return set(sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:count])

    return len(best(first) & best(second)) / count


def plain_ranks(scores: list[float]) -> list[float]:
    return [
        sum(other < mine for other in scores) + (sum(other == mine for other in scores) + 1) / 2
        for mine in scores
    ]


def plain_correlation(first: list[float], second: list[float]) -> float:
    one, other = plain_ranks(first), plain_ranks(second)
    mean = (len(one) + 1) / 2
    product = sum((a - mean) * (b - mean) for a, b in zip(one, other, strict=True))
    spread = sum((a - mean) ** 2 for a in one) * sum((b - mean) ** 2 for b in other)
    return product / math.sqrt(spread) if spread else math.nan


def padded(rows: list[list[float]], filler: float) -> tuple[Tensor, Tensor]:
    """Rows of unequal length and which are real, with padding on both sides."""
    longest = max(map(len, rows)) + 2
    scores, mask = torch.full((len(rows), longest), filler), torch.zeros(len(rows), longest).bool()
    for number, row in enumerate(rows):
        start = number % 3
        scores[number, start : start + len(row)] = torch.tensor(row)
        mask[number, start : start + len(row)] = True
    return scores, mask


def close(got: Tensor, wanted: list[float] | float) -> None:
    expected = torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-12, atol=1e-12)


@given(st.lists(PAIRS, min_size=1, max_size=4), KEEPS, st.sampled_from([0.0, math.inf, math.nan]))
def test_batches_with_padding_are_as_rows_alone(
    pairs: list[tuple[list[float], list[float]]], keep: int | float, filler: float
) -> None:
    first, mask = padded([pair[0] for pair in pairs], filler)
    second, _ = padded([pair[1] for pair in pairs], filler)
    close(overlap(first, second, keep, mask), [plain_overlap(*pair, keep) for pair in pairs])
    close(rank_correlation(first, second, mask), [plain_correlation(*pair) for pair in pairs])
    close(ranks(first, mask)[mask], [rank for pair in pairs for rank in plain_ranks(pair[0])])


def test_leading_axes_broadcast() -> None:
    draw = torch.Generator().manual_seed(0)
    vision = torch.rand(2, 1, 12, generator=draw)
    llm = torch.rand(2, 3, 12, generator=draw)
    for measured in (overlap(vision, llm, 4), rank_correlation(vision, llm)):
        assert measured.shape == (2, 3)
    for batch in range(2):
        for layer in range(3):
            pair = vision[batch, 0].tolist(), llm[batch, layer].tolist()
            close(overlap(vision, llm, 4)[batch, layer], plain_overlap(*pair, 4))
            close(rank_correlation(vision, llm)[batch, layer], plain_correlation(*pair))


def test_agreement_and_disagreement() -> None:
    scores = torch.rand(3, 20, generator=torch.Generator().manual_seed(1))
    assert (overlap(scores, scores, 5) == 1).all()
    assert (overlap(scores, -scores, 5) == 0).all()
    close(rank_correlation(scores, scores), [1.0] * 3)
    close(rank_correlation(scores, -scores), [-1.0] * 3)


def test_random_scores_are_as_chance() -> None:
    """Means over 4,000 rows; bounds are five standard errors, with a fixed seed."""
    draw = torch.Generator().manual_seed(2)
    first, second = torch.rand(2, 4000, 40, generator=draw)
    shared = overlap(first, second, 10)
    assert abs(float(shared.mean()) - 10 / 40) < 5 * float(shared.std()) / 4000**0.5
    related = rank_correlation(first, second)
    assert abs(float(related.mean())) < 5 * float(related.std()) / 4000**0.5


def test_what_is_undefined_is_nan() -> None:
    flat, one = torch.zeros(1, 4), torch.tensor([[True, False, False, False]])
    assert rank_correlation(flat, torch.rand(1, 4)).isnan().all()
    assert rank_correlation(torch.rand(1, 4), torch.rand(1, 4), one).isnan().all()
    assert overlap(flat, flat, 2, torch.zeros(1, 4, dtype=torch.bool)).isnan().all()


def test_half_precision_scores_and_inputs_are_untouched() -> None:
    scores = torch.rand(2, 6, generator=torch.Generator().manual_seed(3)).half()
    before = scores.clone()
    assert (overlap(scores, scores, 0.5) == 1).all()
    assert (rank_correlation(scores, scores) == 1).all()
    assert torch.equal(scores, before)


def test_what_cannot_be_compared_is_refused() -> None:
    row = torch.rand(4)
    with pytest.raises(ShapeError, match=r"of one length, got \(4,\), \(5,\)"):
        overlap(row, torch.rand(5), 2)
    with pytest.raises(ShapeError, match="leading axes must broadcast"):
        rank_correlation(torch.rand(2, 4), torch.rand(3, 4))
    with pytest.raises(ShapeError, match="mask must be bool"):
        rank_correlation(row, row, torch.ones(4))
    with pytest.raises(ScoreError, match="must not be NaN"):
        rank_correlation(row, torch.tensor([0.0, 1.0, math.nan, 2.0]))
    with pytest.raises(BudgetError, match="keep=0"):
        overlap(row, row, 0)
