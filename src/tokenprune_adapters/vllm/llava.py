"""LLaVA-1.5 in vLLM, compressed before the LLM. Imported by vLLM alone.

vLLM is told of K placeholders per picture, and gets K embeddings: the prompt, its slots in the KV
cache and its positions are those of a picture with K tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm import __version_tuple__
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdate

from tokenprune.errors import AttachError
from tokenprune.spec import shown

from ..hf.anatomy import feature_layer
from .parents import check_parents, overrides
from .request_options import Options, check_overrides, check_pixels, no_value_errors
from .settings import KEY, Served, check_engine
from .tower import ClipTaps

COUNTS = "tokenprune_counts"
"""How many tokens each picture keeps, on its way from the processor to the model."""


class TokenpruneLlavaProcessingInfo(LlavaProcessingInfo):  # type: ignore[misc]
    """Facts about pictures that vLLM asks for before it sees them.

    The first of our classes that an engine makes. Checks are here and not in `register`, because an
    exception there would stop every vLLM of the machine.
    """

    @overrides("ctx")
    def __init__(self, ctx: Any) -> None:
        check_parents(
            __version_tuple__,
            TokenpruneLlavaProcessingInfo,
            TokenpruneLlavaProcessor,
            TokenpruneLlavaForConditionalGeneration,
        )
        super().__init__(ctx)
        options = ctx.get_mm_config()
        given = options.mm_processor_kwargs or {}
        with no_value_errors():
            check_overrides(ctx.model_config.hf_overrides)
            self.served = Served.of(self.get_hf_config())
            check_engine(self.served, embeds=options.enable_mm_embeds, processor_kwargs=given)
            if given:
                self.options.check(given)

    @cached_property
    def options(self) -> Options:
        """What a request may say to the processor."""
        return Options.of(self.get_hf_processor())

    @property
    @overrides("")
    def model_id(self) -> str:
        # Part of the key of every cached picture: engines with another spec share no entry.
        return f"{super().model_id} {KEY}={shown(self.served.strategy)}"

    @overrides("image_width image_height")
    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        return self.served.count()

    @overrides("seq_len mm_counts")
    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        # A request may ask for more than the engine's own budget, up to everything.
        return {"image": self.served.tokens}


class TokenpruneLlavaProcessor(LlavaMultiModalProcessor):  # type: ignore[misc]
    """Prompts with as many placeholders as a picture keeps.

    `mm_processor_kwargs` are part of the key under which vLLM caches pictures and prefixes of
    prompts, so that one picture at two budgets is two entries.
    """

    @overrides("inputs timing_ctx")
    def apply(self, inputs: Any, timing_ctx: object) -> Any:
        if inputs.hf_processor_mm_kwargs:  # here, because what follows may come from a cache
            self.info.options.check(inputs.hf_processor_mm_kwargs)
        return super().apply(inputs, timing_ctx)

    @overrides("mm_items hf_kwargs", "mm_items hf_processor_mm_kwargs")  # since 0.31, before
    def _apply_hf_processor_main(
        self, mm_items: MultiModalDataItems, **named: Mapping[str, object]
    ) -> Any:
        ((name, given),) = named.items()
        count = self.info.served.count(given.get(KEY))
        rest = {option: value for option, value in given.items() if option != KEY}
        made = super()._apply_hf_processor_main(mm_items=mm_items, **{name: rest})
        if "pixel_values" in made:
            check_pixels(made["pixel_values"], self.info.get_hf_config().vision_config.image_size)
            made[COUNTS] = torch.full((len(made["pixel_values"]),), count)
        return made

    @overrides("hf_inputs hf_processor_mm_kwargs")
    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {
            **super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs),
            COUNTS: MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    @overrides("mm_items hf_processor_mm_kwargs out_mm_kwargs")
    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: object,
    ) -> Sequence[PromptUpdate]:
        placeholder = self.info.get_hf_config().image_token_index
        count = self.info.served.count(hf_processor_mm_kwargs.get(KEY))
        return [PromptReplacement("image", target=[placeholder], replacement=[placeholder] * count)]


@MULTIMODAL_REGISTRY.register_processor(
    TokenpruneLlavaProcessor,
    info=TokenpruneLlavaProcessingInfo,
    dummy_inputs=LlavaDummyInputsBuilder,
)
class TokenpruneLlavaForConditionalGeneration(LlavaForConditionalGeneration):  # type: ignore[misc]
    """LLaVA-1.5 whose vision tokens are reduced between the tower and the projector."""

    # A LoRA there would be told token counts that are not the tower's.
    supports_tower_connector_lora = False

    @overrides("vllm_config prefix")
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.served = Served.of(self.config)
        self.taps = ClipTaps(
            self.vision_tower,
            self.served.strategy.signals,
            feature_layer(self.config),
            tensor_model_parallel_all_gather,
        )
        # The encoder's budget counts tokens that are kept, of many more pictures than without
        # compression; the tower takes no more at a time than its memory was profiled for.
        budget = vllm_config.scheduler_config.max_num_encoder_input_tokens
        self.pictures = max(1, budget // self.served.tokens)

    @overrides("kwargs")
    def embed_multimodal(self, **kwargs: object) -> list[Tensor]:
        pixels: Any = kwargs.get("pixel_values")
        if pixels is None:
            return []
        counts: Any = kwargs.get(COUNTS, ())
        numbers = [int(count) for count in counts]
        if len(numbers) != len(pixels):  # vLLM would take the first rows of each picture
            raise AttachError(f"{len(pixels)} pictures came with {len(numbers)} budgets")
        kept = [
            features
            for some, wanted in zip(
                torch.split(pixels, self.pictures), _split(numbers, self.pictures), strict=True
            )
            for features in self._kept(some, wanted)
        ]
        embedded = self.multi_modal_projector(torch.cat(kept))
        return list(torch.split(embedded, numbers))

    def _kept(self, pixels: Tensor, counts: list[int]) -> list[Tensor]:
        self.vision_tower(pixels, feature_select_strategy="default")
        tokens, signals = self.taps.observation.take()
        return self.served.reduce(tokens, signals, counts)


def _split(numbers: list[int], size: int) -> list[list[int]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]
