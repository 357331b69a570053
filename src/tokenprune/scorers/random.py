"""Random scores: the control that every method must beat."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..fields import check_whole
from ..noise import uniform
from ..signals import Signals
from ..strategy import Scorer
from ..tokens import VisualTokens


@dataclass(frozen=True)
class RandomScorer(Scorer):
    """Independent uniform scores in [0, 1), from a seed.

    Counter-based, from seed, image (`VisualTokens.ids`) and patch: the same picture gets the
    same scores alone, in a batch, padded, and on any device, the sets are nested in the budget,
    and no global state is touched.

    Args:
        seed: a non-negative int.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("seed", self.seed, 0)

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        return uniform(self.seed, tokens.ids, tokens.patches)
