"""Continuous batching of transformers keeps keys and values in pages: refused in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import GenerationConfig

import tokenprune
from support.llava import collate, generate, prompts, tiny_llava
from tokenprune import UnsupportedError
from tokenprune_adapters.hf.llm.kv_cache import check_cache, state_of

IDS = [[1, 5, 6, 7], [1, 8, 9, 10, 11]]
WORDS = "cannot hold shortened prompts: continuous batching"


@pytest.mark.skipif(
    not hasattr(transformers, "ContinuousBatchingConfig"), reason="it would take all memory"
)
def test_each_request_says_why_and_the_model_stays_as_it_was() -> None:
    """Transformers catches what a pass raises."""
    model: Any = tiny_llava()
    inputs = collate(prompts())
    expected = generate(model, inputs, steps=2)
    settings = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=63, pad_token_id=0)
    # Not most of the memory.
    few = transformers.ContinuousBatchingConfig(
        num_blocks=8, max_batch_tokens=64
    )  # not most of the memory
    with tokenprune.attach(model, "random | evict(4) @ after-layer(1)"):
        done = model.generate_batch(IDS, generation_config=settings, continuous_batching_config=few)
    assert len(done) == 2
    for request in done.values():
        assert f"PagedAttentionCache {WORDS}" in request.error
        assert "use generate with a batch, or vLLM" in request.error
    assert torch.equal(generate(model, inputs, steps=2).text, expected.text)


class Pages:
    """A cache without layers."""


@pytest.mark.parametrize("ask", [state_of, check_cache])
def test_any_cache_without_layers_is_named(ask: Any) -> None:
    with pytest.raises(UnsupportedError, match=f"a Pages {WORDS}"):
        ask(Pages())
