"""Clopper-Pearson lower bound of a binomial rate."""

from __future__ import annotations

import math


def lower_bound(successes: int, trials: int, confidence: float) -> float:
    """The exact (Clopper-Pearson) lower confidence bound of a binomial rate.

    Args:
        successes: number of successes of `trials` independent ones.
        trials: how many.
        confidence: one-sided, between 0 and 1.

    >>> round(lower_bound(100, 100, 0.95), 4), round(lower_bound(8, 10, 0.95), 4)
    (0.9705, 0.4931)
    """
    if not 0 <= successes <= trials or not 0 < confidence < 1:
        raise ValueError(f"no bound for {successes} of {trials} at confidence {confidence}")
    if successes == 0:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(60):  # to the last bit; the tail grows with the rate
        middle = (low + high) / 2
        if _tail(successes, trials, middle) < 1 - confidence:
            low = middle
        else:
            high = middle
    return low


def trials_needed(floor: float, confidence: float) -> int:
    """The fewest trials, all successful, whose bound reaches `floor`.

    >>> trials_needed(0.99, 0.95)
    299
    """
    return math.ceil(math.log(1 - confidence) / math.log(floor))


def _tail(successes: int, trials: int, rate: float) -> float:
    """Probability of at least `successes`."""
    if rate in (0.0, 1.0):
        return rate
    logs = (
        math.lgamma(trials + 1)
        - math.lgamma(k + 1)
        - math.lgamma(trials - k + 1)
        + k * math.log(rate)
        + (trials - k) * math.log1p(-rate)
        for k in range(successes, trials + 1)
    )
    return math.fsum(map(math.exp, logs))
