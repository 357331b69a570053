"""DeepStack: features that a model adds to hidden states of visual tokens between its layers.

The model would add them at slots of the whole prompt. Where slots are left out, they are taken out
of its arguments, and the hook before the next layer adds those of the tokens that are left.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenprune.errors import UnsupportedError

from ...kit.prompt_layout import PromptLayout
from ..names import Call


@dataclass(frozen=True, eq=False)
class DeepStack:
    """Features between layers, and the slots of the latest segment that they belong to.

    Attributes:
        features: by the layer behind which they are added, `(visual slots, channels)` each.
        row: `(batch, slots)` int64, the row of features of each slot; -1 for none.
    """

    features: tuple[Tensor, ...]
    row: Tensor

    @classmethod
    def taken(cls, call: Call, layers: int) -> DeepStack | None:
        """Those of a call of the language model, taken out of its arguments; None without any.

        Args:
            call: of the language model.
            layers: number of its layers.
        """
        features, visual = call.deepstack, call.visual_slots
        if features is None or visual is None:
            return None
        if len(features) >= layers:
            raise UnsupportedError(
                f"{call.what} adds features behind its last layer, which cannot be done at kept "
                "tokens from outside"
            )
        call.deepstack = call.visual_slots = None
        rank = (visual.flatten().cumsum(0) - 1).reshape(visual.shape)
        return cls(tuple(features), rank.masked_fill(~visual, -1))

    def through(self, layout: PromptLayout | None) -> DeepStack:
        """The same at the slots that `layout` leaves."""
        if layout is None:
            return self
        # Fillers come out as zero, so numbers travel as one more.
        return DeepStack(self.features, layout.shorten(self.row + 1) - 1)

    def added(self, hidden: Tensor, layer: int) -> Tensor:
        """`hidden` as it comes out of `layer`, with what the model adds there."""
        if not 0 <= layer < len(self.features):
            return hidden
        features = self.features[layer].to(hidden.device, hidden.dtype)
        if not len(features):
            return hidden
        row = self.row.to(hidden.device)
        more = features.index_select(0, row.clamp(min=0).flatten()).reshape(hidden.shape)
        return hidden + more.masked_fill((row < 0)[:, :, None], 0)
