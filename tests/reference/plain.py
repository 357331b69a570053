"""Every method once more, for one picture, in plain loops over float64: slow, short, independent.

Written from the papers. Each reducer returns its plan as a matrix, one row per kept token. What the
library adds is stated here too: ties go to the lowest index, cosines count as equal when they are
to 24 bits, the order is that of the raster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

Array = np.ndarray


def cos(a: Array, b: Array) -> float:
    """Cosine of two vectors, 0 where one is zero."""
    lengths = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    return round(float(a @ b) / lengths * 2**24) / 2**24 if lengths else 0.0


def means(groups: Sequence[Sequence[int]], sizes: Array) -> Array:
    """Size-weighted means of groups, in the order of their smallest members."""
    rows = []
    for members in sorted(groups, key=min):
        row = np.zeros(len(sizes))
        for i in members:
            row[i] = sizes[i] / sum(sizes[j] for j in members)
        rows.append(row)
    return np.array(rows).reshape(len(groups), len(sizes))


def evict(scores: Array, keep: int) -> Array:
    """The highest scores."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return means([[i] for i in order[:keep]], np.ones(len(scores)))


def tome(metric: Array, sizes: Array, keep: int) -> Array:
    """Halving rounds of bipartite soft matching."""
    groups = [[i] for i in range(len(metric))]
    while len(groups) > keep:
        merges = min(len(groups) - keep, len(groups) // 2)
        sums = [sum(sizes[i] * metric[i] for i in members) for members in groups]
        pairs = []
        for a in range(0, len(groups), 2):
            partners = [(-cos(sums[a], sums[b]), b) for b in range(1, len(groups), 2)]
            pairs.append((*min(partners), a))
        joined = {a: b for _, b, a in sorted(pairs, key=lambda p: (p[0], p[2]))[:merges]}
        merged = {i: list(members) for i, members in enumerate(groups) if i not in joined}
        for a, b in joined.items():
            merged[b] += groups[a]
        groups = sorted(merged.values(), key=min)
    return means(groups, sizes)


def kmeans(
    x: Array, sizes: Array, keep: int, draw: Callable[[int, int], float], rounds: int = 20
) -> Array:
    """Greedy k-means++ and Lloyd in exact fractions, for whole numbers. draw(step, trial)."""
    n = len(x)
    points = [[Fraction(int(v)) for v in row] for row in x]
    weight = [Fraction(int(s)) for s in sizes]

    def apart(p: Sequence[Fraction], q: Sequence[Fraction]) -> Fraction:
        return sum(((a - b) ** 2 for a, b in zip(p, q, strict=True)), Fraction(0))

    def drawn(mass: Sequence[Fraction], u: float) -> int:
        upto = Fraction(0)
        for i, m in enumerate(mass):
            upto += m
            if upto > Fraction(u) * sum(mass):
                return i
        raise AssertionError

    starts = [drawn(weight, draw(0, 0))]
    for step in range(1, keep):
        nearest = [min(apart(p, points[c]) for c in starts) for p in points]
        mass = [d * w for d, w in zip(nearest, weight, strict=True)]
        if not any(mass):
            starts.append(next(i for i in range(n) if i not in starts))
            continue
        trials = []
        for trial in range(2 + int(math.log(keep))):
            pick = drawn(mass, draw(step, trial))
            cost = sum(
                w * min(d, apart(p, points[pick]))
                for p, d, w in zip(points, nearest, weight, strict=True)
            )
            trials.append((cost, trial, pick))
        starts.append(min(trials)[2])

    def assign(centers: list[list[Fraction]]) -> list[int]:
        distance = [[apart(p, c) for c in centers] for p in points]
        group = [min(range(keep), key=lambda c, i=i: (distance[i][c], c)) for i in range(n)]
        off = [distance[i][group[i]] for i in range(n)]
        empty = [c for c in range(keep) if c not in group]
        stays = {
            c: min((i for i in range(n) if group[i] == c), key=lambda i: (off[i], i))
            for c in set(group)
        }
        movable = [i for i in range(n) if stays[group[i]] != i]
        for c, i in zip(empty, sorted(movable, key=lambda i: (-off[i], i)), strict=False):
            group[i] = c
        return group

    group = assign([points[i] for i in starts])
    for _ in range(rounds):
        centers = []
        for c in range(keep):
            mine = [i for i in range(n) if group[i] == c]
            total = sum(weight[i] for i in mine)
            centers.append(
                [sum(weight[i] * points[i][k] for i in mine) / total for k in range(x.shape[1])]
            )
        group = assign(centers)
    return means([[i for i in range(n) if group[i] == c] for c in range(keep)], sizes)


def diverse(x: Array, keep: int) -> Array:
    """Greedy max-min cosine distance."""
    n = len(x)
    apart = [[1 - cos(x[i], x[j]) for j in range(n)] for i in range(n)]
    first = max(range(n), key=lambda i: (min(apart[i][j] for j in range(n) if j != i), -i))
    chosen = [first]
    while len(chosen) < keep:
        left = [i for i in range(n) if i not in chosen]
        chosen.append(max(left, key=lambda i: (min(apart[i][j] for j in chosen), -i)))
    return means([[i] for i in chosen], np.ones(n))


def important_diverse(x: Array, scores: Array, keep: int, share: float, step: int) -> Array:
    """VisPruner's two parts."""
    order = sorted(range(len(x)), key=lambda i: (-scores[i], i))
    important = math.floor(Fraction(str(share)) * keep)
    chosen, rest = order[:important], order[important:]
    while len(rest) > keep - important:
        even, odd = rest[::2], rest[1::2]
        drop = min(step, len(rest) - (keep - important), len(even))
        best = {i: max((cos(x[i], x[j]) for j in odd), default=-2) for i in even}
        rest = sorted(even, key=lambda i: -best[i])[drop:] + odd
    return means([[i] for i in chosen + rest], np.ones(len(x)))


def dominant_contextual(
    metric: Array, scores: Array, sizes: Array, keep: int, contextual: int, mean: bool = True
) -> Array:
    """VisionZip's two parts; mean=False adds the mean of the others to the target."""
    n = len(metric)
    order = sorted(range(n), key=lambda i: (-scores[i], i))
    dominant = order[: keep - contextual]
    rest = [i for i in range(n) if i not in dominant]
    stride = max(len(rest) // contextual, 1) if contextual else 1
    targets = rest[::stride][:contextual]
    groups = {t: [t] for t in targets}
    for i in rest:
        if targets and i not in targets:
            groups[max(targets, key=lambda t, i=i: (cos(metric[i], metric[t]), -t))].append(i)
    if mean:
        return means([*([i] for i in dominant), *groups.values()], sizes)
    rows = {i: np.eye(n)[i] for i in dominant}
    for t, members in groups.items():
        others = [i for i in members if i != t]
        rows[min(members)] = np.eye(n)[t] + sum(np.eye(n)[i] / len(others) for i in others)
    return np.array([rows[i] for i in sorted(rows)])


def single_head(logits: Array) -> Array:
    """The softmax of one head over all channels, from the heads' scaled products (heads, keys)."""
    total = logits.sum(0) / math.sqrt(len(logits))
    exp = np.exp(total - total.max())
    return exp / exp.sum()


def outliers(attention: Array) -> list[int]:
    """Tukey's fence above the third quartile."""
    low, high = np.percentile(attention, [25, 75])
    return [i for i, a in enumerate(attention) if a > high + 1.5 * (high - low)]


def samples(n: int, count: int) -> list[int]:
    """PruMerge+'s spatial samples, with `count` outliers of `n`."""
    return list(range(0, n, max(int(int(n / max(count, 1)) / 3), 1)))


def prumerge(attention: Array, keys: Array, kept: Sequence[int], near: int) -> Array:
    """Kept tokens plus their neighbours by attention, and one token for all others."""
    n = len(attention)
    rows = {}
    for i in kept:
        row = np.eye(n)[i]
        others = sorted((j for j in range(n) if j != i), key=lambda j, i=i: -cos(keys[i], keys[j]))
        for j in others[:near]:
            row[j] = attention[j]
        rows[i] = row
    rest = [i for i in range(n) if i not in kept]
    if rest:
        rows[rest[0]] = np.array([attention[i] if i in rest else 0 for i in range(n)])
    return np.array([rows[i] for i in sorted(rows)])
