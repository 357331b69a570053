"""Case of a family: a tiny model, and prompts as its processor would hand them over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.kept_patches import Kind

from ..anatomy import Anatomy
from ..family import Family

Inputs = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class FamilyCase:
    """Case of a family.

    Weights should be so large that it matters who is attended to; those of an untrained model are
    not, and its faults would drown in rounding.

    Attributes:
        family: the family.
        build: function that makes the model for an attention implementation, in evaluation mode
            and float32, with the same weights each time. It needs at least four decoder layers.
        inputs: function that makes the model's arguments for some of three prompts, by their
            numbers; left padded. Prompt 2 is text alone.
        rows: for each budget row of prompts 0 and 1, in the order of placeholders of a kind, its
            kind
            and its number of slots. Some prompt should hold several, and one a video where the
            family takes any.
        patches: for each row `(slots,)` int64, the patch that each slot is, -1 for none; None
            where all slots hold patches.
        per: what budgets are for: ``"crop"`` where rows are tiles, else ``"image"``.
        silent: token ids that are never generated, such as placeholders.
        state: attributes of the core that the model itself writes while it runs.
        longer: function that makes the arguments for prompt 0 with three more tokens of text.
        tolerance: gap of float32 logits.
    """

    family: Family
    build: Callable[[str], Any]
    inputs: Callable[[Sequence[int]], Inputs]
    rows: Sequence[tuple[Kind, int]]
    longer: Callable[[], Inputs]
    patches: Sequence[Tensor] | None = None
    per: str = "image"
    silent: Sequence[int] = ()
    state: Sequence[str] = ()
    tolerance: float = 5e-5

    def anatomy(self, model: nn.Module) -> Anatomy:
        """The parts of `model`."""
        return self.family.anatomy(model)

    def budget(self, reducer: str, keep: int) -> str:
        """A reducer with a budget, as the family wants it."""
        more = "" if self.per == "image" else f", per={self.per!r}"
        return f"{reducer}({keep}{more})"

    def generate(self, model: Any, inputs: Inputs, steps: int, **options: Any) -> Tensor:
        """`(batch, steps)` int64, the tokens that a model says."""
        given = {"max_new_tokens": steps, "do_sample": False} | options
        if self.silent:
            given["suppress_tokens"] = list(self.silent)
        with torch.no_grad():
            said: Tensor = model.generate(**inputs, **given)
        return said[:, -steps:]
