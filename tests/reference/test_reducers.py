"""Reducers against the plain versions, over shapes, ties, duplicates, zeros and precisions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from reference import plain
from reference.cases import CHANNELS, KINDS, Picture, matrix
from tokenprune import (
    ClsAttention,
    Diverse,
    DominantContextual,
    Evict,
    ImportantDiverse,
    JointClsAttention,
    Keys,
    KMeans,
    Plan,
    Pool,
    PruMerge,
    PruMergePlus,
    Reducer,
    Signals,
    ToMe,
    VisualTokens,
)
from tokenprune.noise import uniform

SHAPES = [(1, 1), (2, 1), (3, 2), (7, 1), (9, 4), (16, 5), (21, 20), (30, 7)]
"""Tokens, and tokens to keep."""

over_cases = pytest.mark.parametrize("kind", KINDS)
over_shapes = pytest.mark.parametrize(("tokens", "keep"), SHAPES)


def same(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal up to float32 weights."""
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


@over_cases
@over_shapes
def test_evict(kind: str, tokens: int, keep: int) -> None:
    picture = Picture.draw(kind, tokens, keep)
    same(matrix(Evict(keep), picture), plain.evict(picture.scores.numpy(), keep))


@over_cases
@over_shapes
def test_tome(kind: str, tokens: int, keep: int) -> None:
    picture = Picture.draw(kind, tokens, keep)
    same(matrix(ToMe(keep), picture), plain.tome(picture.x, picture.sizes.numpy(), keep))


@over_shapes
def test_tome_on_keys(tokens: int, keep: int) -> None:
    picture = Picture.draw("normal", tokens, keep)
    keys = picture.signals[Keys(-2)][0].mean(0).double().numpy()
    reducer = ToMe(keep, metric="keys")
    same(matrix(reducer, picture), plain.tome(keys, picture.sizes.numpy(), keep))


def test_tome_by_hand() -> None:
    # Even: 0 and 2, odd: 1 and 3. 0 is most like 3, 2 is most like 1, and 0-3 is the closer pair.
    x = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [1.0, 0.1]]])
    plan = ToMe(3).plan(VisualTokens.of(x), None, Signals())
    assert plan.source().tolist() == [[0, 1, 2, 0]]
    assert torch.allclose(plan(x)[0, 0], torch.tensor([1.0, 0.05]))
    assert ToMe(2).plan(VisualTokens.of(x), None, Signals()).source().tolist() == [[0, 1, 1, 0]]


def test_groups_of_tome_grow_as_the_budget_falls() -> None:
    x = VisualTokens.of(torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0)))
    finer = ToMe(40).plan(x, None, Signals()).source()
    for keep in range(39, 0, -1):
        coarser = ToMe(keep).plan(x, None, Signals()).source()
        for row in range(2):
            for group in finer[row].unique():
                assert len(coarser[row][finer[row] == group].unique()) == 1
        finer = coarser


def test_the_length_of_a_token_does_not_matter_to_the_first_round_of_tome() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 32, 8, generator=generator)
    longer = x * torch.rand(1, 32, 1, generator=generator).add(0.1)
    plans = [ToMe(20).plan(VisualTokens.of(each), None, Signals()) for each in (x, longer)]
    assert torch.equal(plans[0].source(), plans[1].source())


@pytest.mark.parametrize("kind", ["whole", "repeated", "zeros"])
@over_shapes
@pytest.mark.parametrize("seed", [0, 3])
def test_kmeans(kind: str, tokens: int, keep: int, seed: int) -> None:
    picture = Picture.draw(kind, tokens, keep)
    whole = Picture((picture.features * 3).round(), None, picture.sizes)

    def draw(step: int, trial: int) -> float:
        counter = torch.tensor([[64 * step + trial]])
        return float(uniform(seed, torch.zeros(1, dtype=torch.int64), counter))

    expected = plain.kmeans(whole.x, whole.sizes.numpy(), keep, draw)
    same(matrix(KMeans(keep, seed=seed), whole), expected)


@over_cases
@over_shapes
def test_clusters_are_as_good_as_lloyd_can_make_them(kind: str, tokens: int, keep: int) -> None:
    picture = Picture.draw(kind, tokens, keep)
    ours = matrix(KMeans(keep, iterations=200), picture)
    assert ours.shape == (keep, tokens)
    assert ((ours > 0).sum(0) == 1).all()
    centers = ours @ picture.x
    distance = ((picture.x[:, None] - centers[None]) ** 2).sum(-1)
    own = (distance * (ours > 0).T).sum(1)
    if len(np.unique(picture.x, axis=0)) >= keep:
        assert (own <= distance.min(1) + 1e-6).all()


def test_lloyd_never_makes_clusters_worse() -> None:
    x = torch.randn(1, 60, 4, generator=torch.Generator().manual_seed(0))

    def inertia(iterations: int) -> float:
        plan = KMeans(9, iterations=iterations).plan(VisualTokens.of(x), None, Signals())
        centers = plan(x).gather(1, plan.source()[:, :, None].expand(-1, -1, 4))
        return float((x - centers).square().sum())

    values = [inertia(n) for n in range(8)]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1]


def test_one_cluster_is_the_mean_and_moving_the_picture_changes_no_cluster() -> None:
    x = torch.randn(1, 50, 4, generator=torch.Generator().manual_seed(0))
    one = KMeans(1).plan(VisualTokens.of(x), None, Signals())
    assert torch.allclose(one(x)[0, 0], x[0].mean(0), atol=1e-6)
    here = KMeans(7).plan(VisualTokens.of(x), None, Signals())
    there = KMeans(7).plan(VisualTokens.of(x.double() + 100), None, Signals())
    assert torch.equal(here.source(), there.source())


@over_cases
@over_shapes
def test_diverse(kind: str, tokens: int, keep: int) -> None:
    picture = Picture.draw(kind, tokens, keep)
    expected = plain.diverse(picture.x, keep) if tokens > 1 else np.ones((1, 1))
    same(matrix(Diverse(keep), picture), expected)


def test_diverse_never_repeats_a_token() -> None:
    x = VisualTokens.of(torch.ones(1, 6, 3))
    assert Diverse(4).plan(x, None, Signals()).anchors.tolist() == [[0, 1, 2, 3]]


def test_diverse_is_nested_and_gets_closer() -> None:
    x = torch.randn(1, 40, 6, generator=torch.Generator().manual_seed(0))
    tokens = VisualTokens.of(x)
    normal = torch.nn.functional.normalize(x[0], dim=-1)
    before, closest = set(), 2.0
    for keep in range(2, 40):
        kept = Diverse(keep).plan(tokens, None, Signals()).anchors[0]
        assert before < set(kept.tolist())
        apart = 1 - normal[kept] @ normal[kept].T
        apart.fill_diagonal_(2)
        assert float(apart.min()) <= closest + 1e-6
        before, closest = set(kept.tolist()), float(apart.min())


@over_cases
@over_shapes
@pytest.mark.parametrize(("share", "step"), [(0.5, 8), (0.2, 2), (0.0, 3), (1.0, 1)])
def test_important_diverse(kind: str, tokens: int, keep: int, share: float, step: int) -> None:
    picture = Picture.draw(kind, tokens, keep)
    reducer = ImportantDiverse(keep, important=share, step=step)
    expected = plain.important_diverse(picture.x, picture.scores.numpy(), keep, share, step)
    same(matrix(reducer, picture), expected)


@over_cases
@over_shapes
@pytest.mark.parametrize("contextual", [0, 1, 3])
@pytest.mark.parametrize("mean", [True, False])
def test_dominant_contextual(
    kind: str, tokens: int, keep: int, contextual: int, mean: bool
) -> None:
    picture = Picture.draw(kind, tokens, keep)
    reducer = DominantContextual(keep, contextual=contextual, metric="features", normalize=mean)
    expected = np.eye(tokens)
    if keep < tokens:
        expected = plain.dominant_contextual(
            picture.x,
            picture.scores.numpy(),
            picture.sizes.numpy(),
            keep,
            min(contextual, keep),
            mean,
        )
    same(matrix(reducer, picture), expected)


def test_the_papers_splits_are_the_default_of_dominant_contextual() -> None:
    x = VisualTokens.of(torch.randn(1, 576, 8, generator=torch.Generator().manual_seed(0)))
    keys = Signals({Keys(-2): torch.randn(1, 2, 576, 4)})
    scores = torch.arange(576.0)[None]
    for keep, contextual in ((64, 10), (128, 20), (192, 30)):
        default = DominantContextual(keep).plan(x, scores, keys)
        split = DominantContextual(keep, contextual=contextual).plan(x, scores, keys)
        assert torch.equal(default.dense(), split.dense())
        assert default.lengths == (keep,)


def attended(kind: str, tokens: int, seed: int, peaks: int) -> tuple[Picture, np.ndarray]:
    """A picture with [CLS] attention that has `peaks` peaks, and the products behind it."""
    picture = Picture.draw(kind, tokens, seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, tokens + 1, generator=generator).double() * 0.3
    logits[:, 1 + torch.randperm(tokens, generator=generator)[:peaks]] += 3
    rows = logits.softmax(-1)[:, 1:].float()[None, None]
    keys = torch.randn(1, 3, tokens, 2, generator=generator)
    if kind == "repeated":
        keys = keys[:, :, torch.randint(3, (tokens,), generator=generator)]
    joint = torch.from_numpy(plain.single_head(logits.numpy()))[1:].float()[None, None]
    signals = {ClsAttention((-1,)): rows, JointClsAttention((-1,)): joint, Keys(-1): keys}
    return Picture(picture.features, None, None, signals), logits.numpy()


def flat_keys(picture: Picture) -> np.ndarray:
    """Keys over all channels of all heads."""
    return picture.signals[Keys(-1)][0].permute(1, 0, 2).flatten(1).double().numpy()


@pytest.mark.parametrize("kind", ["normal", "repeated", "half"])
@pytest.mark.parametrize(("tokens", "peaks"), [(1, 0), (5, 1), (24, 3), (40, 0), (40, 5)])
@pytest.mark.parametrize("heads", ["joint", "mean"])
@pytest.mark.parametrize("plus", [False, True])
def test_prumerge_as_published(kind: str, tokens: int, peaks: int, heads: str, plus: bool) -> None:
    picture, logits = attended(kind, tokens, 3, peaks)
    attention = picture.signals[ClsAttention((-1,))][0, 0].double().numpy().mean(0)
    if heads == "joint":
        attention = plain.single_head(logits)[1:]
    kept = plain.outliers(attention)
    if plus:
        kept = sorted({*kept, *plain.samples(tokens, len(kept))})
    expected = plain.prumerge(attention, flat_keys(picture), kept, 4)
    cls = PruMergePlus if plus else PruMerge
    got = matrix(cls(heads=heads, neighbours=4), picture)
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize(("tokens", "keep"), [(2, 1), (9, 4), (40, 11), (40, 39), (40, 40)])
@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_prumerge_with_an_exact_budget(tokens: int, keep: int, plus: bool, normalize: bool) -> None:
    picture, _ = attended("normal", tokens, 4, 3)
    attention = picture.signals[ClsAttention((-1,))][0, 0].double().numpy().mean(0)
    order = sorted(range(tokens), key=lambda i: (-attention[i], i))
    top = order[: keep - 1]
    if plus:
        top = order[: -(-(keep - 1) // 4)]
        rest = [i for i in range(tokens) if i not in top]
        spread = keep - 1 - len(top)
        top = top + [rest[i * len(rest) // spread] for i in range(spread)]
    cls = PruMergePlus if plus else PruMerge
    got = matrix(cls(keep, heads="mean", normalize=normalize, neighbours=5), picture)
    assert len(got) == keep
    if keep == tokens:
        same(got, np.eye(tokens))
        return
    expected = plain.prumerge(attention, flat_keys(picture), top, 5)
    if normalize:
        expected /= expected.sum(1, keepdims=True)
    same(got, expected)


@pytest.mark.parametrize("tokens", range(5, 14))
@pytest.mark.parametrize(("above", "outliers"), [(1.001, 1), (0.999, 0)])
@pytest.mark.parametrize("first", [True, False])
def test_quartiles_are_interpolated_between_order_statistics(
    tokens: int, above: float, outliers: int, first: bool
) -> None:
    """The largest attention stands at Tukey's fence, which rounded quartiles would move."""
    rest = [Fraction((place + 3) ** 2, 4000) for place in range(tokens - 1)]

    def quartile(quarters: int) -> Fraction:
        below, part = divmod((tokens - 1) * quarters, 4)
        high = rest[min(below + 1, tokens - 2)]
        return rest[below] + (high - rest[below]) * Fraction(part, 4)

    fence = float(quartile(3) + Fraction(3, 2) * (quartile(3) - quartile(1)))
    largest = fence * above
    assert largest > rest[-1]
    values = [largest, *map(float, rest)] if first else [*map(float, rest[::-1]), largest]
    row = torch.tensor(values)[None, None, None]
    keys = torch.randn(1, 1, tokens, 2, generator=torch.Generator().manual_seed(0))
    signals = Signals({ClsAttention((-1,)): row, Keys(-1): keys})
    x = VisualTokens.of(torch.rand(1, tokens, 2))
    plan = PruMerge(heads="mean", neighbours=0).plan(x, None, signals)
    assert plan.lengths == (outliers + 1,)  # and the extra token
    assert (values.index(largest) in plan.anchors[0].tolist()) or not outliers


def test_outliers_do_not_depend_on_the_scale_of_attention() -> None:
    picture, _ = attended("normal", 40, 1, 4)
    rows = picture.signals[ClsAttention((-1,))]
    counts = set()
    for scale in (1.0, 0.5, 0.125):
        signals = {**picture.signals, ClsAttention((-1,)): rows * scale}
        scaled = Picture(picture.features, signals=signals)
        counts.add(len(matrix(PruMerge(heads="mean"), scaled)))
    assert len(counts) == 1
    assert counts.pop() >= 5  # four peaks and the extra token


@pytest.mark.parametrize(("side", "cells"), [(4, 2), (6, 3), (24, 12), (6, 6), (6, 1)])
def test_pool_is_average_pooling_where_cells_fit(side: int, cells: int) -> None:
    x = torch.randn(1, side * side, 5, generator=torch.Generator().manual_seed(0))
    plan = Pool(cells * cells).plan(VisualTokens.of(x), None, Signals())
    image = x.transpose(1, 2).reshape(1, 5, side, side)
    expected = torch.nn.functional.avg_pool2d(image, side // cells).flatten(2).transpose(1, 2)
    # Cells come in the order of their first patch, which is that of the raster here.
    assert torch.allclose(plan(x), expected, atol=1e-5)


@pytest.mark.parametrize(
    "grid", [(4, 4), (3, 5), (5, 3), (1, 7), (2, 9), (9, 2), (3, 13), (24, 24)]
)
def test_cells_of_a_pool_are_even_rectangles(grid: tuple[int, int]) -> None:
    rows, columns = grid
    x = VisualTokens.of(torch.randn(1, rows * columns, 2))
    for keep in range(1, rows * columns, max(rows * columns // 20, 1)):
        source = Pool(keep, grid=grid).plan(x, None, Signals()).source()[0]
        cells = source.reshape(rows, columns)
        assert sorted(cells.unique().tolist()) == list(range(keep))
        for cell in range(keep):
            y, x_ = (cells == cell).nonzero(as_tuple=True)
            area = (y.max() - y.min() + 1) * (x_.max() - x_.min() + 1)
            assert area == len(y)


def test_tokens_that_fill_no_grid_are_pooled_in_runs() -> None:
    x = torch.randn(1, 9, 2)
    broken = VisualTokens.of(x, patches=torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 20]]))
    plan = Pool(3).plan(broken, None, Signals())
    assert plan.source().tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2]]
    whole = Pool(3).plan(VisualTokens.of(x), None, Signals())
    assert whole.source().tolist() == [[0, 0, 1, 0, 0, 1, 2, 2, 2]]


@pytest.mark.parametrize(
    "reducer",
    [
        ToMe(4),
        KMeans(4),
        Pool(4),
        Diverse(4),
        ImportantDiverse(4),
        DominantContextual(4, metric="features"),
        PruMerge(4),
        PruMergePlus(4),
    ],
    ids=lambda reducer: type(reducer).__name__,
)
class TestProtected:
    """Protected tokens survive alone and count; the plan for the others is that without them."""

    def plan(self, reducer: object, protected: list[int], without: bool = False) -> Plan:
        picture, _ = attended("normal", 12, 2, 2)
        stay = [i for i in range(12) if not (without and i in protected)]
        marked = torch.zeros(1, 12, dtype=torch.bool)
        marked[0, protected] = True
        tokens = VisualTokens.of(picture.features[None, stay], protected=marked[:, stay])
        signals = Signals(
            {
                s: a.index_select(s.axes.split().index("tokens"), torch.tensor(stay))
                for s, a in picture.signals.items()
            }
        )
        return reducer.plan(tokens, torch.arange(12.0)[None, stay], signals)

    def test_they_survive_alone_and_count(self, reducer: object) -> None:
        plan = self.plan(reducer, [1, 8])
        assert plan.lengths == (4,)
        dense = plan.dense()[0]
        for slot in (1, 8):
            assert dense[:, slot].count_nonzero() == 1
            owner = int(dense[:, slot].argmax())
            assert dense[owner].count_nonzero() == 1
            assert dense[owner, slot] == 1

    def test_they_may_take_the_whole_budget(self, reducer: object) -> None:
        for protected in ([0, 3, 5, 9], [0, 3, 5, 9, 11]):
            plan = self.plan(reducer, protected)
            assert plan.lengths == (len(protected),)
            assert plan.anchors.tolist() == [protected]
            assert torch.equal(plan.dense()[0], torch.eye(12)[protected])


def test_rows_with_and_without_protected_tokens_do_not_meet() -> None:
    """Diverse starts from what is protected, in the rows that have any."""
    x = torch.stack([Picture.draw("normal", 12, seed).features for seed in range(3)])
    marked = torch.zeros(3, 12, dtype=torch.bool)
    marked[1, 7] = True
    together = Diverse(4).plan(VisualTokens.of(x, protected=marked), None, Signals())
    for row in range(3):
        one = VisualTokens.of(x[row : row + 1], protected=marked[row : row + 1])
        assert torch.equal(Diverse(4).plan(one, None, Signals()).anchors[0], together.anchors[row])


@pytest.mark.parametrize(
    "reducer", [Evict(2), ImportantDiverse(2), DominantContextual(2)], ids=lambda r: repr(r)[:9]
)
def test_scores_are_needed_and_it_says_who_should_have_checked(reducer: Reducer) -> None:
    tokens = VisualTokens.of(torch.zeros(1, 3, 1))
    with pytest.raises(AssertionError, match=r"^Strategy checks that a scorer came before"):
        reducer.plan(tokens, None, Signals())


@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize("cls", [ToMe, KMeans, Pool])
def test_protected_tokens_take_no_part_in_merging(cls: type, count: int) -> None:
    helper = TestProtected()
    among = helper.plan(cls(count + 2), [2, 7])
    without = helper.plan(cls(count), [2, 7], without=True)
    others = [i for i in range(12) if i not in (2, 7)]
    groups = among.dense()[0][:, others]
    assert torch.equal(groups[groups.any(1)], without.dense()[0])


def test_later_reducers_see_what_earlier_ones_left() -> None:
    from tokenprune import parse

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, CHANNELS, generator=generator)
    rows = torch.randn(2, 3, 4, 65, generator=generator).softmax(-1)[..., 1:]
    strategy = parse("cls-attention | evict(32) | tome(12)").strategy
    reduction = strategy(VisualTokens.of(x), Signals({ClsAttention(3): rows}))
    for row in range(2):
        scores = rows[row].double().numpy().mean((0, 1))
        first = plain.evict(scores, 32)
        second = plain.tome(first @ x[row].double().numpy(), np.ones(32), 12)
        same(reduction.plan.dense()[row].double().numpy(), second @ first)
    assert reduction.tokens.sizes.sum(1).tolist() == [32, 32]
    assert torch.allclose(reduction.tokens.features, reduction.plan(x), atol=1e-6)


@pytest.mark.parametrize("protected", [0, 3, 7])
def test_tome_counts_even_and_odd_among_the_tokens_that_are_not_protected(protected: int) -> None:
    """The authors count among all, so that a token in front turns the pairs round."""
    x = Picture.draw("normal", 8, 6).features
    marked = torch.zeros(1, 8, dtype=torch.bool)
    marked[0, protected] = True
    others = [slot for slot in range(8) if slot != protected]
    plan = ToMe(5).plan(VisualTokens.of(x[None], protected=marked), None, Signals())
    expected = plain.tome(x[others].double().numpy(), np.ones(7), 4)
    rows = plan.dense()[0].double().numpy()
    same(rows[rows[:, protected] == 0][:, others], expected)
