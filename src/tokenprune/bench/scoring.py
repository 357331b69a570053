"""Means over questions, with standard errors that know which share a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Mean:
    """A mean over questions.

    Attributes:
        value: the mean.
        error: its standard error, clustered by picture; NaN for fewer than two pictures.
        questions: how many.
    """

    value: float
    error: float
    questions: int


def mean(values: Sequence[float], groups: Sequence[str]) -> Mean:
    """The mean of `values`, where values of a group (a picture) may be alike.

    The variance is the cluster-robust one of a mean, with the G / (G - 1) correction for G groups.

    Args:
        values: one for each question.
        groups: which picture each is about.

    >>> mean([0.0, 1.0], ["a", "b"])
    Mean(value=0.5, error=0.5, questions=2)
    """
    if len(values) != len(groups) or not values:
        raise ValueError(f"need one group for each value, got {len(values)} and {len(groups)}")
    index = {name: place for place, name in enumerate(dict.fromkeys(groups))}
    all_values = torch.tensor(values, dtype=torch.float64)
    value = all_values.mean()
    pull = torch.zeros(len(index), dtype=torch.float64)
    pull.index_add_(0, torch.tensor([index[name] for name in groups]), all_values - value)
    count = len(index)
    error = math.nan
    if count > 1:
        error = math.sqrt(float(pull.square().sum()) * count / (count - 1)) / len(values)
    return Mean(float(value), error, len(values))


def balanced(values: Sequence[float], types: Sequence[str], groups: Sequence[str]) -> Mean:
    """The mean over types of question, each of the same weight, with a clustered error.

    The error is NaN where a type has questions about one picture only: nobody knows how far they
    would differ about another.
    """
    names = list(dict.fromkeys(types))
    weight = {name: len(types) / (len(names) * types.count(name)) for name in names}
    each = {
        name: sum(v for v, t in zip(values, types, strict=True) if t == name) / types.count(name)
        for name in names
    }
    value = sum(each.values()) / len(names)
    # As a mean of questions whose deviation from their own type's mean is weighted.
    pull = [value + weight[t] * (v - each[t]) for v, t in zip(values, types, strict=True)]
    asked = set(zip(types, groups, strict=True))
    alone = any(sum(kind == name for kind, _ in asked) < 2 for name in names)
    return Mean(value, math.nan if alone else mean(pull, groups).error, len(values))


def f1(replies: Sequence[bool], truths: Sequence[bool]) -> float:
    """F1 of "yes", as POPE reports it; NaN where neither truth nor reply is ever yes.

    >>> f1([True, True, False], [True, False, False])
    0.6666666666666666
    """
    both = sum(r and t for r, t in zip(replies, truths, strict=True))
    total = sum(replies) + sum(truths)
    return 2 * both / total if total else math.nan
