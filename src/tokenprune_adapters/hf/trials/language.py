"""Language model of a transformers model, run by hand on one prompt: no padding, no cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention_maps import eager


class Language:
    """A vanilla language model and its head.

    Args:
        model: a whole model of transformers, vanilla.
    """

    def __init__(self, model: Any) -> None:
        self.llm = model.model.language_model
        self.layers = self.llm.layers
        self.head = model.lm_head
        self.embed = model.get_input_embeddings()

    def logits(
        self, embeds: Tensor, text: Tensor, start: int | None = None, slots: Tensor | None = None
    ) -> Tensor:
        """Logits after a prompt, and after every token of `text` but the last.

        Args:
            embeds: `(slots, channels)` of the prompt.
            text: `(steps,)` ids that follow it.
            start: layer from which on the prompt is shorter; None for none.
            slots: those that are left from there on, at their old positions.

        Returns:
            `(steps, vocabulary)`.
        """
        steps = len(text)
        x = torch.cat([embeds, self.embed(text[:-1])])
        places = torch.arange(len(x), device=x.device)
        if start is None or slots is None:
            out = self.llm(inputs_embeds=x[None], position_ids=places[None], use_cache=False)
            return self._head(out.last_hidden_state[0, -steps:])
        x = self._through(x, places, 0, start)
        left = torch.cat([slots, places[len(embeds) :]])
        x = self._through(x[left], places[left], start, len(self.layers))
        return self._head(self.llm.norm(x[-steps:]))

    def last_query(self, embeds: Tensor, layer: int) -> Tensor:
        """`(slots,)` attention of the last token of a prompt in `layer`, head mean."""
        places = torch.arange(len(embeds), device=embeds.device)
        maps: list[Tensor] = []
        attention = self.layers[layer].self_attn
        handle = attention.register_forward_hook(lambda part, args, out: maps.append(out[1]))
        try:
            with eager(self.llm):
                self._through(embeds, places, 0, layer + 1)
        finally:
            handle.remove()
        return maps[0][0, :, -1].float().mean(0)

    def _through(self, x: Tensor, places: Tensor, start: int, stop: int) -> Tensor:
        """Hidden states `(slots, channels)` after layers `start` to `stop`."""
        # A mask that is added suits eager attention and torch's own.
        lowest = torch.finfo(x.dtype).min
        mask = torch.full((len(x), len(x)), lowest, dtype=x.dtype, device=x.device).triu(1)
        rotary = self.llm.rotary_emb(x[None], position_ids=places[None])
        for layer in self.layers[start:stop]:
            out = layer(x[None], attention_mask=mask[None, None], position_embeddings=rotary)
            x = (out[0] if isinstance(out, tuple) else out)[0]
        return x

    def _head(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x)
        return logits
