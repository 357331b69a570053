"""FastV: what the LLM itself attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from einops import reduce
from torch import Tensor

from ..fields import check_choice
from ..signals import LastQueryAttention, Signal, Signals, TextQueryAttention
from ..strategy import Scorer
from ..tokens import VisualTokens

Queries: TypeAlias = Literal["last", "text"]


@dataclass(frozen=True)
class FastVScorer(Scorer):
    """Attention that visual tokens receive in the latest LLM layer, head mean.

    FastV (arXiv 2403.06764). Only after a layer: ``"fastv | evict(128) @ after-layer(2)"`` ranks by
    layer index 1, the second one. The mean runs over query heads, softmax is in float32.

    Args:
        queries: ``"last"``, the last real token of the prompt (the released code), or ``"text"``,
            the mean over all text tokens after the image (the paper's wording).
    """

    queries: Queries = "last"

    def __post_init__(self) -> None:
        check_choice("queries", self.queries, get_args(Queries))

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset({self._signal})

    @property
    def _signal(self) -> Signal:
        return LastQueryAttention() if self.queries == "last" else TextQueryAttention()

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        rows = signals[self._signal].float()
        return reduce(rows, "batch layers heads tokens -> batch tokens", "mean")
