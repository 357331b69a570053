"""KMeans over the visual tokens: the clustering baseline of VTC-CLS."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..budget import Budgeted
from ..fields import check_whole
from ..metric import squared_distances, wide
from ..noise import uniform
from ..plan import Plan
from ..signals import Signals
from ..strategy import Reducer
from ..tokens import VisualTokens
from .kept_counts import Free, column, kept_counts, minus

_COARSE = 2.0**-10
"""Distances to centers are quotients, so they are compared 2^10 times coarser than they are."""

_MOST_TRIALS = 64
"""More than any number of trials, which grows with the logarithm of the clusters."""


@dataclass(frozen=True)
class KMeans(Budgeted, Reducer):
    """Merge the tokens of each of `keep` clusters into their mean.

    The baseline of VTC-CLS (arXiv 2412.05819, table 3). Greedy k-means++ from a seed, then Lloyd's
    iterations on squared Euclidean distances between features. No cluster is ever empty: one that
    would be takes the token that is farthest from its center. Ties go to the lowest index, and the
    same picture gives the same clusters on any device, alone, padded or in a batch.

    Tokens weigh as much as their `sizes`. Protected ones take no part and count towards the
    budget; where they fill it, the other tokens are dropped.

    Args:
        keep: tokens that stay per row: int = count, float = fraction.
        per: what the budget is for (see `Keep`).
        seed: a non-negative int.
        iterations: Lloyd iterations at most.
    """

    seed: int = 0
    iterations: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("seed", self.seed, 0)
        check_whole("iterations", self.iterations, 0)

    @property
    def ignores_scores(self) -> bool:
        return True

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        counts = kept_counts(self.budget, tokens)
        if counts == tokens.lengths:
            return Plan.identity(tokens.mask, tokens.lengths)
        free = Free.of(tokens)
        clusters = tuple(minus(counts, tokens.protected_lengths))
        here = torch.arange(tokens.mask.shape[1], device=tokens.mask.device)
        groups = torch.where(tokens.mask & tokens.protected, here, -1)
        if any(clusters):
            problem = _Rows(
                squared_distances(tokens.features, free.mask),
                wide(tokens.sizes) * free.mask,
                free.mask,
                clusters,
            )
            centers = problem.plus_plus(self.seed, tokens.ids)
            # A cluster is named after the token that it started from.
            names = centers.gather(1, problem.lloyd(centers, self.iterations))
            clustered = free.mask & (column(clusters, here.device) > 0)
            groups = torch.where(clustered, names, groups)
        return Plan.group(groups, tokens.sizes, counts)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Clustering problems, one per row.

    Attributes:
        distance: `(batch, tokens, tokens)` float64, whole numbers (see `squared_distances`).
        weight: `(batch, tokens)` float64, zero for tokens that take no part.
        free: `(batch, tokens)` bool, the tokens that take part.
        clusters: how many clusters per row; 0 leaves the row alone.
    """

    distance: Tensor
    weight: Tensor
    free: Tensor
    clusters: tuple[int, ...]

    def plus_plus(self, seed: int, ids: Tensor) -> Tensor:
        """`(batch, clusters)` int64: tokens to start from, distinct in each row.

        Greedy k-means++ (Arthur and Vassilvitskii, 2007): the next is the best of several drawn
        with a probability in proportion to the squared distance from the nearest so far.
        """
        batch, tokens = self.free.shape
        most = max(self.clusters)
        trials = [2 + int(math.log(max(k, 1))) for k in self.clusters]
        # Counters depend on step and trial alone, so not on what else is in the batch.
        step = torch.arange(most, device=ids.device)[:, None] * _MOST_TRIALS
        counters = step + torch.arange(max(trials), device=ids.device)
        draws = uniform(seed, ids, counters.flatten().expand(batch, -1))
        draws = wide(draws).reshape(batch, *counters.shape)
        beyond = None
        if min(trials) < max(trials):  # how many draws a row makes must not depend on the others
            beyond = torch.arange(max(trials), device=ids.device) >= column(trials, ids.device)
        flat = self.distance.flatten(0, 1)
        row = torch.arange(batch, device=ids.device)[:, None] * tokens
        chosen = ~self.free
        started = torch.zeros(batch, most, dtype=torch.int64, device=ids.device)
        pick = _draw(self.weight, draws[:, 0, :1])
        nearest = flat.index_select(0, (pick + row).flatten())
        for number in range(most):
            if number:
                mass = nearest * self.weight
                picks = _draw(mass, draws[:, number])
                closer = torch.minimum(
                    nearest[:, None], flat[(picks + row).flatten()].reshape(*picks.shape, tokens)
                )
                cost = closer.mul_(self.weight[:, None]).sum(2)
                if beyond is not None:
                    cost.masked_fill_(beyond, torch.inf)
                best = cost.argmin(1, keepdim=True)
                # Where all that is left coincides with what was chosen, the next token will do.
                other = chosen.to(torch.uint8).argmin(1, keepdim=True)
                pick = torch.where(mass.sum(1, keepdim=True) > 0, picks.gather(1, best), other)
                nearest = torch.minimum(nearest, flat.index_select(0, (pick + row).flatten()))
            started[:, number : number + 1] = pick
            chosen.scatter_(1, pick, True)
        return started

    def lloyd(self, centers: Tensor, iterations: int) -> Tensor:
        """`(batch, tokens)` int64: the cluster of each token, none of them empty."""
        batch, tokens = self.free.shape
        most = centers.shape[1]
        unused = torch.arange(most, device=centers.device) >= column(self.clusters, centers.device)
        row = torch.arange(batch, device=centers.device)[:, None]
        source = (self.distance * self.weight[:, :, None]).flatten(0, 1)
        to_center = self.distance.flatten(0, 1)[(centers + row * tokens).flatten()]
        to_center = to_center.reshape(batch, most, tokens) * _COARSE
        group = self._assign(to_center.round_(), unused)
        for _ in range(iterations):
            total = source.new_zeros(batch * most, tokens)
            total.index_add_(0, (group + row * most).flatten(), source)
            total = total.reshape(batch, most, tokens)
            mass = self.weight.new_zeros(batch, most).scatter_add_(1, group, self.weight)
            own = total.gather(1, group[:, None, :]).squeeze(1) * self.weight
            spread = self.weight.new_zeros(batch, most).scatter_add_(1, group, own)
            mass = mass.clamp(min=torch.finfo(torch.float32).tiny)[:, :, None]
            to_center = total.div_(mass).sub_(spread[:, :, None] / (2 * mass**2))
            again = self._assign(to_center.mul_(_COARSE).round_(), unused)
            if _settled(again, group):
                break
            group = again
        return group

    def _assign(self, to_center: Tensor, unused: Tensor) -> Tensor:
        """The nearest center of each token, then a token for every cluster left empty.

        Args:
            to_center: `(batch, clusters, tokens)` whole numbers.
            unused: `(batch, clusters)` bool, True beyond the clusters of a row.
        """
        to_center = to_center.masked_fill_(unused[:, :, None], torch.inf)
        distance, group = to_center.min(dim=1)
        count = torch.zeros(unused.shape, dtype=torch.int64, device=group.device)
        count.scatter_add_(1, group, self.free.to(torch.int64))
        empty = (count == 0) & ~unused
        if empty.device.type == "cpu" and not bool(empty.any()):
            return group
        # The nearest token of each cluster stays in it; of the others the farthest are moved.
        rank = _rank(distance.masked_fill(~self.free, torch.inf))
        tokens = group.shape[1]
        staying = torch.full_like(count, tokens).scatter_reduce_(1, group, rank, "amin")
        movable = self.free & (rank != staying.gather(1, group))
        order = _rank((-distance).masked_fill(~movable, torch.inf))
        empties = torch.argsort(empty.logical_not().to(torch.uint8), dim=1, stable=True)
        moved = movable & (order < empty.sum(1, keepdim=True))
        goal = empties.gather(1, order.clamp(max=empties.shape[1] - 1))
        return torch.where(moved, goal, group)


def _draw(mass: Tensor, draws: Tensor) -> Tensor:
    """`(batch, trials)` int64: tokens drawn with a probability in proportion to their mass.

    Args:
        mass: `(batch, tokens)` >= 0.
        draws: `(batch, trials)` uniform in [0, 1).
    """
    upto = mass.cumsum(1)
    return torch.searchsorted(upto, draws * upto[:, -1:], right=True).clamp(max=mass.shape[1] - 1)


def _rank(x: Tensor) -> Tensor:
    """`(batch, tokens)` int64: the place of each token in ascending order, ties by index."""
    order = torch.argsort(x, dim=1, stable=True)
    here = torch.arange(x.shape[1], device=x.device).expand_as(x)
    return torch.empty_like(order).scatter_(1, order, here)


def _settled(again: Tensor, group: Tensor) -> bool:
    """Whether nothing changes any more, where asking costs nothing: more rounds change nothing."""
    return again.device.type == "cpu" and torch.equal(again, group)
