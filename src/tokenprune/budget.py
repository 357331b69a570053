"""`Keep`: how many visual tokens stay."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Literal, TypeAlias, get_args

from .errors import BudgetError

Per: TypeAlias = Literal["image", "crop", "frame"]
"""What one budget is for: a whole image over all its crops (a whole video over all its frames),
every crop, or every video frame. The adapter makes the rows accordingly; a step sees rows."""

PER: tuple[str, ...] = get_args(Per)


@dataclass(frozen=True)
class Keep:
    """Budget: what STAYS of a row of visual tokens, a count (int) or a fraction (float in (0, 1]).

    `count` is pure and needs no tensor, so an engine can size its placeholders before the vision
    tower runs. Fractions round half up in decimal arithmetic, never to less than one token.

    Args:
        amount: tokens to keep (int) or the fraction to keep (float).
        per: what the budget is for, ``"image"`` (default), ``"crop"`` or ``"frame"``.

    Raises:
        BudgetError: a negative count, a fraction outside (0, 1] or an unknown `per`.

    >>> Keep(128).count(576), Keep(0.25).count(576), Keep(0.5).count(7), Keep(128).count(5)
    (128, 144, 4, 5)
    """

    amount: int | float
    per: Per = "image"

    def __post_init__(self) -> None:
        if self.per not in PER:
            raise BudgetError(f"per must be one of {', '.join(PER)}, got {self.per!r}")
        if isinstance(self.amount, float):
            object.__setattr__(self, "amount", float(self.amount))  # numpy's float64 is a float
            if not 0.0 < self.amount <= 1.0:
                raise BudgetError(
                    f"a fraction to keep must be in (0, 1], got {self.amount}; "
                    "write a count of tokens as an int, e.g. 128"
                )
            return
        try:
            if isinstance(self.amount, bool):
                raise TypeError
            amount = operator.index(self.amount)
        except TypeError:
            raise BudgetError(
                f"keep must be an int (count) or a float (fraction), got {self.amount!r}"
            ) from None
        if amount < 0:
            raise BudgetError(f"a count of tokens to keep must be >= 0, got {self.amount!r}")
        object.__setattr__(self, "amount", amount)

    @classmethod
    def from_pruning_rate(cls, rate: float, per: Per = "image") -> Keep:
        """The budget of papers that state what is REMOVED (FastV's R, FasterVLM's reduction ratio).

        Raises:
            BudgetError: a rate outside [0, 1).

        >>> Keep.from_pruning_rate(0.75)
        Keep(amount=0.25, per='image')
        """
        if not 0.0 <= rate < 1.0:
            raise BudgetError(f"a pruning rate must be in [0, 1), got {rate}")
        return cls(float(1 - Decimal(repr(float(rate)))), per)

    def count(self, tokens: int) -> int:
        """Tokens that stay of a row of `tokens`: at most all; a fraction keeps at least one."""
        if isinstance(self.amount, int):
            return min(self.amount, tokens)
        exact = Decimal(repr(self.amount)) * tokens
        return min(max(int(exact.to_integral_value(ROUND_HALF_UP)), 1), tokens)


KeepLike: TypeAlias = int | float | Keep
"""A budget as steps take it: a count (int), a fraction of what comes in (float), or a `Keep`."""


@dataclass(frozen=True)
class Budgeted:
    """Mixin with the two fields that reducers with a budget share.

    Args:
        keep: tokens that stay: int = count, float = fraction, or a `Keep`.
        per: what the budget is for (see `Keep`).
    """

    keep: KeepLike
    per: Per = "image"

    def __post_init__(self) -> None:
        keep = self.keep if isinstance(self.keep, Keep) else Keep(self.keep, self.per)
        if self.per not in ("image", keep.per):
            raise BudgetError(f"per={self.per!r} contradicts {keep}; give it once")
        object.__setattr__(self, "keep", keep.amount)
        object.__setattr__(self, "per", keep.per)

    @property
    def budget(self) -> Keep:
        """`keep` and `per` as one value."""
        assert not isinstance(self.keep, Keep)
        return Keep(self.keep, self.per)
