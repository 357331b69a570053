"""Selector time of reducers, as ratios to plain references on this machine.

    python tests/benchmarks/bench_reducers.py [--rounds 9]

Pairs are timed in turn (CPU time) in one process on one thread, and medians of the ratios are
printed: below 1 is faster than the reference. The references are written here from the papers'
descriptions, the way research code does it: per image, with Python loops where there are loops.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from tokenprune import (
    Diverse,
    DominantContextual,
    Evict,
    ImportantDiverse,
    JointClsAttention,
    Keys,
    KMeans,
    Pool,
    PruMerge,
    PruMergePlus,
    Reducer,
    Signals,
    ToMe,
    VisualTokens,
)


def ratio(ours: Callable[[], object], reference: Callable[[], object], rounds: int) -> float:
    """Median over rounds of the CPU time of `ours` over that of `reference`, taken in turn."""
    ours(), reference()
    ratios = []
    for _ in range(rounds):
        start = time.process_time()
        ours()
        middle = time.process_time()
        reference()
        ratios.append((middle - start) / (time.process_time() - middle))
    return statistics.median(ratios)


def evict(features: Tensor, scores: Tensor, keep: int) -> Tensor:
    """Topk, sort, gather with an expanded index."""
    index = scores.topk(keep, dim=1).indices.sort(dim=1).values
    return features.gather(1, index[:, :, None].expand(-1, -1, features.shape[2]))


def tome(features: Tensor, keep: int) -> Tensor:
    """Bipartite soft matching in halving rounds, with sizes and a source matrix, in float32."""
    batch, tokens, _ = features.shape
    x, size = features, features.new_ones(batch, tokens, 1)
    source = torch.eye(tokens)[None].expand(batch, tokens, tokens)
    while x.shape[1] > keep:
        count = x.shape[1]
        merge = min(count - keep, count // 2)
        metric = x / x.norm(dim=-1, keepdim=True)
        scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
        best, partner = scores.max(dim=-1)
        order = best.argsort(dim=-1, descending=True)[:, :, None]
        left, merged = order[:, merge:], order[:, :merge]
        goal = partner[:, :, None].gather(1, merged)

        def combine(
            y: Tensor,
            how: str,
            merged: Tensor = merged,
            left: Tensor = left,
            goal: Tensor = goal,
        ) -> Tensor:
            width = y.shape[2]
            even, odd = y[:, ::2], y[:, 1::2]
            stay = even.gather(1, left.expand(-1, -1, width))
            move = even.gather(1, merged.expand(-1, -1, width))
            odd = odd.scatter_reduce(1, goal.expand(-1, -1, width), move, reduce=how)
            return torch.cat([stay, odd], dim=1)

        source = combine(source, "amax")
        total = combine(x * size, "sum")
        size = combine(size, "sum")
        x = total / size
    return x


def prumerge(features: Tensor, attention: Tensor, keys: Tensor, plus: bool) -> list[Tensor]:
    """The double loop: over images, and over the tokens that stay."""
    results = []
    for x, a, k in zip(features, attention, keys, strict=True):
        tokens = x.shape[0]
        low, high = torch.quantile(a, torch.tensor([0.25, 0.75]))
        count = max(int((a > high + 1.5 * (high - low)).sum()), 1)
        kept = a.topk(count).indices
        if plus:
            step = max(int(int(tokens / count) / 3), 1)
            grid = torch.arange(0, tokens, step)
            kept = torch.cat([kept, grid[~torch.isin(grid, kept)]])
        normal = k / k.norm(dim=-1, keepdim=True)
        updated = []
        for index in kept:
            others = torch.cat([torch.arange(index), torch.arange(index + 1, tokens)])
            similar = normal[index] @ normal[others].T
            near = others[similar.topk(32).indices]
            updated.append(x[index] + (a[near, None] * x[near]).sum(0))
        rest = torch.ones(tokens, dtype=torch.bool)
        rest[kept] = False
        extra = (a[rest, None] * x[rest]).sum(0)
        results.append(torch.stack([*updated, extra]))
    return results


def diverse(features: Tensor, keep: int) -> Tensor:
    """Greedy max-min, one image after the other."""
    results = []
    for x in features:
        normal = x / x.norm(dim=-1, keepdim=True)
        distance = 1 - normal @ normal.T
        chosen = torch.empty(keep, dtype=torch.long)
        for number in range(keep):
            if number == 0:
                nearest = torch.topk(distance, 2, dim=0, largest=False).values[1]
            else:
                nearest = torch.min(distance[chosen[:number]], dim=0).values
            chosen[number] = torch.argmax(nearest)
        results.append(x[chosen.sort().values])
    return torch.stack(results)


def important_diverse(features: Tensor, scores: Tensor, keep: int) -> Tensor:
    """Important ones, and the rest thinned out eight at a time, one image after the other."""
    results = []
    for x, s in zip(features, scores, strict=True):
        order = s.argsort(descending=True)
        important, rest = order[: keep // 2], order[keep // 2 :]
        normal = x / x.norm(dim=-1, keepdim=True)
        while len(rest) > keep - keep // 2:
            drop = min(8, len(rest) - (keep - keep // 2))
            a, b = rest[::2], rest[1::2]
            best = (normal[a] @ normal[b].T).max(dim=1).values
            rest = torch.cat([a[best.argsort(descending=True)[drop:]], b])
        results.append(x[torch.cat([important, rest]).sort().values])
    return torch.stack(results)


Inputs = tuple[VisualTokens, Tensor, Signals]


def inputs(batch: int, count: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Random tokens, scores, and what reducers may ask for."""
    generator = torch.Generator().manual_seed(batch + count)
    features = torch.randn(batch, count, 1024, generator=generator).to(dtype)
    logits = torch.randn(batch, 1, 16, count + 1, generator=generator) * 2
    rows = logits.softmax(-1)[..., 1:]
    joint = (logits.sum(2) / 4).softmax(-1)[..., 1:]
    keys = torch.randn(batch, 16, count, 64, generator=generator)
    signals = Signals({JointClsAttention((-1,)): joint, Keys(-1): keys, Keys(-2): keys})
    return VisualTokens.of(features), rows.mean((1, 2)), signals


def show(what: str, value: float, reach: float | None = None) -> None:
    """One line of the report."""
    goal = "" if reach is None else f"  reach {reach}"
    sys.stdout.write(f"{what:60s} {value:6.3f}{goal}\n")
    sys.stdout.flush()


def run(reducer: Reducer, given: Inputs) -> Tensor:
    """Decide and apply."""
    tokens, scores, signals = given
    return reducer.plan(tokens, scores, signals)(tokens.features)


def bench_evict(batch: int, dtype: torch.dtype, reach: float, rounds: int) -> None:
    """The whole of eviction, and the gather that any eviction needs."""
    given = inputs(batch, 576, dtype)
    tokens, scores, signals = given
    x, reducer = tokens.features, Evict(128)
    plan, index = reducer.plan(tokens, scores, signals), scores.topk(128).indices.sort().values
    value = ratio(lambda: run(reducer, given), lambda: evict(x, scores, 128), rounds)
    show(f"evict 576 -> 128, batch {batch}, {dtype}", value)
    value = ratio(
        lambda: plan(x),
        lambda: x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2])),
        rounds,
    )
    show(f"evict, the gather alone, batch {batch}, {dtype}", value, reach)


def bench_tome(batch: int, count: int, keep: int, reach: float, rounds: int) -> None:
    """The decision with the merge, and the decision alone."""
    given = inputs(batch, count)
    tokens, scores, signals = given
    x, reducer = tokens.features, ToMe(keep)
    value = ratio(lambda: run(reducer, given), lambda: tome(x, keep), rounds)
    show(f"tome {count} -> {keep}, batch {batch}", value, reach)
    value = ratio(lambda: reducer.plan(tokens, scores, signals), lambda: tome(x, keep), rounds)
    show(f"tome {count} -> {keep}, batch {batch}, the plan alone", value)


def bench_kmeans(batch: int, rounds: int) -> None:
    """To scikit-learn, where it is installed."""
    try:
        from sklearn.cluster import KMeans as Estimator
        from threadpoolctl import threadpool_limits
    except ImportError:
        return
    given = inputs(batch, 576)

    def reference() -> None:
        with threadpool_limits(1):
            for x in given[0].features:
                Estimator(128, n_init=1, random_state=0).fit(x.numpy())

    value = ratio(lambda: run(KMeans(128), given), reference, max(rounds // 3, 1))
    show(f"kmeans 576 -> 128, batch {batch}, to scikit-learn", value, 0.14)


def bench_prumerge(batch: int, plus: bool, reach: float, rounds: int) -> None:
    """To the loop over images and kept tokens, with the same attention."""
    given = inputs(batch, 576)
    tokens, _, signals = given
    reducer = PruMergePlus() if plus else PruMerge()
    attention = reducer.attention(tokens, signals)
    keys = signals[Keys(-1)].transpose(1, 2).flatten(2)
    value = ratio(
        lambda: run(reducer, given),
        lambda: prumerge(tokens.features, attention, keys, plus),
        rounds,
    )
    show(f"prumerge{'-plus' if plus else ''} 576, batch {batch}, to the loop", value, reach)


def bench_others(batch: int, rounds: int) -> None:
    """Those for which there is no number to reach."""
    given = inputs(batch, 576)
    tokens, scores, _ = given
    x = tokens.features
    value = ratio(lambda: run(Diverse(128), given), lambda: diverse(x, 128), rounds)
    show(f"diverse 576 -> 128, batch {batch}, to the loop", value)
    value = ratio(
        lambda: run(ImportantDiverse(128), given),
        lambda: important_diverse(x, scores, 128),
        rounds,
    )
    show(f"important-diverse 576 -> 128, batch {batch}, to the loop", value)
    value = ratio(lambda: run(DominantContextual(128), given), lambda: tome(x, 128), rounds)
    show(f"dominant-contextual 576 -> 128, batch {batch}, to tome's loop", value)
    value = ratio(lambda: run(Pool(128), given), lambda: tome(x, 128), rounds)
    show(f"pool 576 -> 128, batch {batch}, to tome's loop", value)


def main(rounds: int) -> None:
    """Print one line per pair."""
    torch.set_num_threads(1)
    for dtype, reach in ((torch.float32, 0.53), (torch.bfloat16, 0.2)):
        for batch in (1, 8):
            bench_evict(batch, dtype, reach, rounds * 10)
    for batch, count, keep, reach in (
        (1, 576, 128, 0.87),
        (8, 576, 128, 0.87),
        (1, 2880, 640, 0.53),
    ):
        bench_tome(batch, count, keep, reach, rounds)
    for batch, reach in ((1, 0.1), (8, 0.04)):
        bench_kmeans(batch, rounds)
        for plus in (False, True):
            bench_prumerge(batch, plus, reach, rounds)
        bench_others(batch, rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    main(parser.parse_args().rounds)
