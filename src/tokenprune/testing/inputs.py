"""`Inputs`: everything that one call of a scorer or reducer reads, and parts of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..signals import Signal, Signals
from ..tokens import VisualTokens

FIELDS = ("features", "mask", "patches", "sizes", "protected", "ids")
"""The tensors of `VisualTokens`."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Inputs of one call of a scorer or reducer.

    Attributes:
        tokens: the visual tokens.
        signals: exactly the signals that the step declares.
        scores: `(batch, tokens)` float32 for a reducer that needs scores, else None.
    """

    tokens: VisualTokens
    signals: Signals
    scores: Tensor | None = None

    def at(self, rows: Sequence[int], slots: Tensor) -> Inputs:
        """These rows, and of each of them the slots `(kept,)` int64, in that order."""
        index = torch.tensor(list(rows))
        taken = {name: getattr(self.tokens, name)[index] for name in FIELDS}
        taken.update({name: taken[name][:, slots] for name in FIELDS if name != "ids"})
        tokens = VisualTokens(**taken)
        answers = {s: _at(s.axes, answer, index, slots) for s, answer in self.signals.items()}
        scores = None if self.scores is None else self.scores[index][:, slots]
        return Inputs(tokens, Signals(answers), scores)

    def row(self, row: int) -> Inputs:
        """One row as it stands, with its padding."""
        return self.at([row], torch.arange(self.tokens.mask.shape[1]))

    def alone(self, row: int) -> Inputs:
        """One row without its padding."""
        return self.at([row], self.real(row))

    def real(self, row: int) -> Tensor:
        """`(real,)` int64 slots of the real tokens of a row."""
        return self.tokens.mask[row].nonzero().flatten()

    @property
    def rows(self) -> range:
        """Numbers of the rows."""
        return range(self.tokens.mask.shape[0])

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, by a name to report."""
        named: dict[str, Tensor] = {f"tokens.{name}": getattr(self.tokens, name) for name in FIELDS}
        named.update({f"signals[{signal!r}]": answer for signal, answer in self.signals.items()})
        if self.scores is not None:
            named["scores"] = self.scores
        return named

    def copy(self) -> Inputs:
        """The same in memory of its own."""
        return Inputs(
            VisualTokens(*(getattr(self.tokens, name).clone() for name in FIELDS)),
            Signals({signal: answer.clone() for signal, answer in self.signals.items()}),
            None if self.scores is None else self.scores.clone(),
        )


def _at(axes: str, answer: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    names = axes.split()
    if "batch" in names:
        answer = answer.index_select(names.index("batch"), rows)
    if "tokens" in names:
        answer = answer.index_select(names.index("tokens"), slots)
    return answer


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit: NaN equals NaN, and -0.0 is not 0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_bits(a), _bits(b))


def _bits(x: Tensor) -> Tensor:
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    x = x.detach().contiguous()
    return x.view(whole[x.element_size()]) if x.is_floating_point() else x


class Spy(Signals):
    """Signals that remember which of them were read."""

    def __init__(self, signals: Signals) -> None:
        super().__init__(dict(signals.items()))
        self.read: set[Signal] = set()
        self.listed = False

    def __getitem__(self, signal: Signal) -> Tensor:
        self.read.add(signal)
        return super().__getitem__(signal)

    def __contains__(self, signal: object) -> bool:
        if isinstance(signal, Signal):
            self.read.add(signal)
        return super().__contains__(signal)
