"""Idle steps: scorers that nobody reads, budgets that nothing exceeds, what a later step undoes.

They are refused: nobody means them, and nothing would show that they do nothing. Only steps of one
strategy are looked at: a stage further on in a schedule that finds nothing to reduce is seen in the
report.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .budget import PER, Keep
from .errors import SpecError

if TYPE_CHECKING:
    from .strategy import Reducer, Scorer


def check_scores_are_read(steps: Sequence[Scorer | Reducer], scorers: Sequence[bool]) -> None:
    """Refuse a scorer whose scores no reducer reads before the next scorer, or at all.

    Args:
        steps: steps of a strategy, in order.
        scorers: whether each of them is a scorer.

    Raises:
        SpecError: names the scorer, what makes it idle, and what would work.
    """
    for number, (step, is_scorer) in enumerate(zip(steps, scorers, strict=True)):
        if not is_scorer:
            continue
        end = scorers.index(True, number + 1) if True in scorers[number + 1 :] else len(steps)
        readers = steps[number + 1 : end]
        if not readers:
            raise SpecError(
                f"{step!r} has no effect: {steps[end]!r} comes before any reducer and replaces "
                "its scores; leave one of them out, or put a reducer between them, as in "
                "'cls-attention | evict(288) | uniform | evict(144)'"
            )
        if all(getattr(reader, "ignores_scores", False) for reader in readers):
            raise SpecError(
                f"{step!r} has no effect: {', '.join(map(repr, readers))} "
                f"{'reads' if len(readers) == 1 else 'read'} no scores; leave the scorer out, or "
                "use a reducer that ranks by scores, as in 'cls-attention | evict(128)'"
            )


def check_no_repetition(steps: Sequence[Scorer | Reducer]) -> None:
    """Refuse a reducer whose choice the next one makes anew: by the same scores, and of fewer.

    Raises:
        SpecError: names both, and what would work.
    """
    for step, following in pairwise(steps):
        if not all(getattr(each, "keeps_highest", False) for each in (step, following)):
            continue
        first, last = _budget(step), _budget(following)
        if first is None or last is None or first.per != last.per or isinstance(last.amount, float):
            continue
        if first.count(last.amount) == last.amount:
            raise SpecError(
                f"{step!r} has no effect: {following!r} comes next and ranks the same tokens by "
                "the same scores; leave the first one out, or put a scorer between them, as in "
                "'cls-attention | evict(288) | uniform | evict(144)'"
            )


def check_budgets_fall(steps: Sequence[Reducer]) -> None:
    """Refuse a reducer to which all is left, or less than it would keep.

    Steps stand in one strategy, so a budget of everything, or of nothing, is refused beside others.

    Raises:
        SpecError: names the reducer, and what would work.
    """
    given = [(step, budget) for step in steps if (budget := _budget(step)) is not None]
    for step, budget in given if len(steps) > 1 else ():
        if isinstance(budget.amount, float) and budget.amount == 1:
            raise SpecError(
                f"{step!r} has no effect: it keeps everything, and other steps reduce; leave it "
                "out, or give it a smaller budget"
            )
        if budget.amount == 0:
            idle = steps[1] if step is steps[0] else steps[0]
            raise SpecError(
                f"{idle!r} has no effect: {step!r} leaves no visual token, before or after; leave "
                "one of them out"
            )
    most: dict[str, int] = {}
    for step, budget in given:
        left = most.get(budget.per)
        # A fraction that leaves all of so many tokens leaves all of fewer.
        if left is not None and budget.count(left) == left:
            raise SpecError(
                f"{step!r} has no effect: earlier steps leave at most {left} visual tokens per "
                f"{budget.per}, and it keeps that many; leave it out, or give it a smaller budget"
            )
        exact = "P3" not in step.exempt
        if left is None and isinstance(budget.amount, int) and exact:
            most[budget.per] = budget.amount
        elif left is not None and exact:
            most[budget.per] = budget.count(left)


def _budget(step: object) -> Keep | None:
    """The budget of a reducer that has one: fields `keep`, a number, and perhaps `per`."""
    keep: object = getattr(step, "keep", None)
    per: Any = getattr(step, "per", "image")
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or per not in PER:
        return None
    return Keep(keep, per)
