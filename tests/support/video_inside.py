"""The oracle of `inside_oracle` for Video-LLaVA: rows are pictures and videos, or frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .inside_oracle import Cut, Recompute, say
from .video_llava import PATCHES, Row, cls_scores, frame_states, kept


class RecomputeVideos(Recompute):
    """One prompt of pictures and videos; `per` says what a budget is for.

    [CLS] of a frame is no patch and no text: it is never dropped, and asks nothing.
    """

    def __init__(self, model: Any, row: Row, cuts: list[Cut], per: str, **options: Any) -> None:
        self.per = per
        super().__init__(model, row, cuts, **options)  # type: ignore[arg-type]

    @torch.no_grad()
    def extend(self, parts: list[int | Tensor]) -> None:
        core = self.model.model
        pieces = [self.prompt]
        for part in parts:
            if not isinstance(part, Tensor):
                pieces.append(core.get_input_embeddings()(torch.tensor([part])))
                self._slot(-1, 0.0)
                continue
            scores = cls_scores(self.model, part, layers=3)
            stay = set(range(scores.numel()))
            if self.before is not None:
                stay = set(kept(self.model, part, self.before, self.per, layers=3))
            states = zip(*frame_states(self.model, part), strict=True)
            for frame, (cls, patches) in enumerate(states):
                shown = [] if part.ndim == 3 else list(cls)
                for _ in shown:
                    self._slot(-2, 0.0)
                if frame == 0 or self.per == "frame":
                    image = max(self.images, default=-1) + 1
                    image = max(image, 0)
                for n, patch in enumerate(patches):
                    if frame * PATCHES + n in stay:
                        shown.append(patch)
                        self._slot(image, float(scores[frame, n]))
                    elif self.positions == "original":
                        self.next_place += 1
                if shown:
                    pieces.append(core.multi_modal_projector(torch.stack(shown)))
        self.prompt = torch.cat(pieces)

    def _slot(self, image: int, cls: float) -> None:
        self.images.append(image)
        self.cls.append(cls)
        self.places.append(self.next_place)
        self.next_place += 1


def greedy(
    model: Any, batch: list[Row], cuts: list[Cut], per: str, steps: int = 5, **options: Any
) -> tuple[Tensor, Tensor]:
    """`(rows, steps)` text and `(rows, steps, vocabulary)` logits, row by row."""
    readers: list[Recompute] = [RecomputeVideos(model, row, cuts, per, **options) for row in batch]
    return say(readers, steps)
