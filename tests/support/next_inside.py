"""The oracle of `inside_oracle` for LLaVA-NeXT: rows are images, packed by hand."""

from __future__ import annotations

from typing import Any

import torch

from .inside_oracle import Cut, Recompute
from .llava_next import Picture, Prompt, kept, tower_scores


class RecomputePacked(Recompute):
    """One prompt of any-resolution pictures.

    Newlines are no patches and ask nothing; they are never dropped, unless before the language
    model and asked to be.
    """

    def __init__(
        self, model: Any, row: Prompt, cuts: list[Cut], newline: str = "keep", **options: Any
    ) -> None:
        self.newline = newline
        super().__init__(model, row, cuts, **options)  # type: ignore[arg-type]

    @torch.no_grad()
    def extend(self, parts: list[int | Picture]) -> None:  # type: ignore[override]
        core = self.model.model
        pieces = [self.prompt]
        old = self.positions == "original"
        for part in parts:
            if not isinstance(part, Picture):
                pieces.append(core.get_input_embeddings()(torch.tensor([part])))
                self._slot(-1, 0.0)
                continue
            states = core.vision_tower(pixel_values=part.crops, output_hidden_states=True)
            projected = core.multi_modal_projector(states.hidden_states[-2][:, 1:])
            scores = tower_scores(self.model, part)
            stay = set(part.packed)
            if self.before is not None:
                stay = kept(self.model, part, self.before, "image")
            image = max(max(self.images, default=-1) + 1, 0)
            for token in part.packed:
                if token is None and self.newline == "keep":
                    pieces.append(core.image_newline[None])
                    self._slot(-2, 0.0)
                elif token is not None and token in stay:
                    pieces.append(projected[token][None])
                    self._slot(image, float(scores[token]))
                elif old:
                    self.next_place += 1
        self.prompt = torch.cat(pieces)

    def _slot(self, image: int, cls: float) -> None:
        self.images.append(image)
        self.cls.append(cls)
        self.places.append(self.next_place)
        self.next_place += 1
