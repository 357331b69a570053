"""Curves of consistency over the layers of the LLM, and the file that holds them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ..bench.scoring import Mean
from ..errors import UnknownNameError
from ..jsonable import jsonable

FORMAT = 1

Queries: TypeAlias = Literal["output", "last"]
"""Whose attention is the LLM's. ``"output"``: of each generated token itself, in the pass that
reads it, mean over them; the end of the text is none of them. This is equation 4 as it is written:
`N + 1` keys, those of the input and its own. ``"last"``: of the last token of the prompt, from
which the first output token is generated."""

Measure: TypeAlias = Literal["overlap", "correlation", "share"]
"""``"overlap"``: p of equation 6. ``"correlation"``: c of equation 8. ``"share"``: how much of its
attention a token that asks spends on visual tokens at all."""

RANDOM = "random"


@dataclass(frozen=True)
class Curve:
    """Curve of one measure over the layers of the LLM.

    Attributes:
        scorer: the spec of the scores that are compared; empty for a share, which needs none.
        measure: what was measured.
        queries: whose attention the LLM's is.
        keep: budget of an overlap: number of tokens that stay, a count or a fraction; else None.
        layers: over questions, one for each layer, the first that runs first.
        mean: over questions, of their mean over layers.
    """

    scorer: str
    measure: Measure
    queries: Queries
    keep: int | float | None
    layers: tuple[Mean, ...]
    mean: Mean


@dataclass(frozen=True)
class Consistency:
    """Consistency of scores with the attention of the LLM.

    Attributes:
        model: its name or folder.
        data: name, and numbers of questions and pictures.
        device: device of the model.
        dtype: dtype of the model.
        tokens: visual tokens of a picture, on average.
        answer: tokens of an answer, on average, its end apart.
        scorers: specs in the order they were given; ``"random"`` is the last.
        keeps: budgets of the overlaps.
        versions: versions of tokenprune, torch and transformers.
        curves: everything that was measured.
    """

    model: str
    data: dict[str, Any]
    device: str
    dtype: str
    tokens: float
    answer: float
    scorers: tuple[str, ...]
    keeps: tuple[int | float, ...]
    versions: dict[str, str]
    curves: tuple[Curve, ...]

    def curve(
        self,
        scorer: str,
        measure: Measure,
        queries: Queries = "output",
        keep: int | float | None = None,
    ) -> Curve:
        """The curve of a scorer; `keep` may be left out where there is one budget.

        Raises:
            UnknownNameError: it was not measured.
        """
        for one in self.curves:
            if (one.scorer, one.measure, one.queries) == (scorer, measure, queries) and (
                keep is None or one.keep == keep
            ):
                return one
        raise UnknownNameError(
            f"no {measure} of {scorer!r} with queries={queries!r} and keep={keep} was measured; "
            f"scorers: {', '.join(self.scorers)}; keep: {', '.join(map(repr, self.keeps))}"
        )

    def write(self, folder: Path) -> None:
        """Write `analyze.json` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(jsonable({"format": FORMAT, **asdict(self)}), indent=1)
        (folder / "analyze.json").write_text(text + "\n")
