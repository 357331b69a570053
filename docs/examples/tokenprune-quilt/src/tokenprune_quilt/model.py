"""Quilt: a ViT, a bridge and a Llama, put together as code that comes with a checkpoint often is.

Pictures stand where `PATCH` is among the ids. There is no `get_image_features`, no `model.model`
and no `vision_config`, so that it is no family of tokenprune. It knows nothing of tokenprune.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

PATCH = 3
"""The id that stands for one patch of a picture."""


class QuiltConfig(PreTrainedConfig):
    """Sizes of a Quilt."""

    model_type = "quilt"

    def __init__(self, eye: dict[str, Any] | None = None, **llm: Any) -> None:
        self.eye = eye or {}
        self.llm = llm
        super().__init__()

    def get_text_config(self, *args: Any, **kwargs: Any) -> LlamaConfig:
        """What `generate` asks about caches."""
        return LlamaConfig(**self.llm)


class Quilt(PreTrainedModel, GenerationMixin):
    """Answers questions about pictures, at random: nobody has trained it."""

    config_class = QuiltConfig
    _supports_sdpa = True

    def __init__(self, config: QuiltConfig) -> None:
        super().__init__(config)
        self.eye = ViTModel(ViTConfig(**config.eye), add_pooling_layer=False)
        self.llm = LlamaForCausalLM(LlamaConfig(**config.llm))
        self.bridge = nn.Linear(self.eye.config.hidden_size, self.llm.config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of words."""
        return self.llm.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pictures: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of every slot.

        Args:
            input_ids: `(batch, new)`, `PATCH` at each patch.
            attention_mask: `(batch, past + new)`, 0 for padding.
            pictures: `(batch, most, 3, height, width)`, as many of a row as its ids have room for.
            kwargs: for the language model, its cache among them.
        """
        embeds = self.get_input_embeddings()(input_ids)
        seats = input_ids == PATCH
        if pictures is not None and bool(seats.any()):
            patches = (self.eye.config.image_size // self.eye.config.patch_size) ** 2
            count = seats.sum(1, keepdim=True) // patches
            shown = torch.arange(pictures.shape[1], device=count.device) < count
            states = self.eye(pictures[shown], output_hidden_states=True).hidden_states[-2]
            embeds = embeds.masked_scatter(seats[:, :, None], self.bridge(states[:, 1:]))
        return self.llm(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, pictures: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Pictures come with the prompt alone, unless there is no cache to remember them."""
        made = super().prepare_inputs_for_generation(input_ids, **kwargs)
        # The name since transformers 5.24, or the one before.
        past = made.get("cache") or made.get("past_key_values")
        if past is None or past.get_seq_length() == 0:
            made["pictures"] = pictures
        return made
