"""Static caches: as many slots as the shortened prompt needs, and the tokens of a dynamic cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, MistralConfig, StaticCache

import tokenprune
from support.llava import PATCHES, Row, collate, generate, picture, prompts, tiny_llava
from tokenprune import UnsupportedError
from tokenprune.versions import library
from tokenprune_adapters.hf.chunked_prefill import VERSION

BEFORE = "cls-attention(layers=1) | evict(6)"
AFTER = "fastv | evict(4) @ after-layer(1)"
SPECS = [
    BEFORE,
    f"{BEFORE} @ before-llm(positions='original')",
    AFTER,
    "fastv | evict(4) @ after-layer(1, positions='reindexed')",
    f"{BEFORE}; {AFTER}",
    "tome(5) @ after-layer(1)",
]
STATIC = {"cache_implementation": "static", "disable_compile": True}


def widths(cache: Any) -> list[int]:
    return [layer.keys.shape[-2] for layer in cache.layers]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("spec", SPECS)
def test_the_same_tokens_in_the_same_slots(
    spec: str, attention: str, rows: int, beams: int
) -> None:
    model, inputs = tiny_llava(attention), collate(prompts()[:rows])
    with tokenprune.attach(model, spec) as attachment:
        wanted = generate(model, inputs, num_beams=beams)
        stored = attachment.report.kv_bytes
        got = generate(model, inputs, num_beams=beams, **STATIC)
    assert torch.equal(got.text, wanted.text)
    torch.testing.assert_close(got.logits, wanted.logits, atol=1e-5, rtol=0)
    assert widths(got.cache) == widths(wanted.cache)  # generate asks for one slot less than tokens
    assert stored < attachment.report.kv_bytes < attachment.report.kv_bytes_vanilla


def test_the_same_logits_in_turns() -> None:
    """Text, a second picture, and text that is left padded, after a first picture."""
    model = tiny_llava()
    first = collate([Row([1, picture(1), 31]), Row([1, 5, picture(2), 41])])
    second = collate([Row([7, 8, 9]), Row([6])])
    third = collate([Row([5, picture(3), 33]), Row([picture(4), 6, 7])])
    made = {}
    for kind in (DynamicCache, StaticCache):
        room = {"max_cache_len": 100} if kind is StaticCache else {}
        cache, mask, seen = kind(config=model.config.text_config, **room), None, []
        with torch.no_grad(), tokenprune.attach(model, f"{BEFORE}; {AFTER}"):
            for turn in (first, second, third, second):
                new = turn["attention_mask"]
                mask = new if mask is None else torch.cat([mask, new], dim=1)
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
                asked = turn | {"attention_mask": mask, "position_ids": positions}
                out = model(**asked, past_key_values=cache)
                seen.append(out.logits[new.bool()])
        made[kind] = torch.cat(seen)
    torch.testing.assert_close(made[StaticCache], made[DynamicCache], atol=1e-5, rtol=0)


def test_what_came_after_the_prompt_can_be_cropped() -> None:
    if VERSION < (5, 24):
        pytest.skip("static caches of this transformers cannot be cropped")
    model, inputs, logits = tiny_llava(), collate(prompts()), []
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.int64)], dim=1)
    with torch.no_grad(), tokenprune.attach(model, f"{BEFORE}; {AFTER}"):
        for options in (STATIC, {}):
            cache = generate(model, inputs, **options).cache
            length = int(cache.get_seq_length())
            with pytest.raises(UnsupportedError, match=r"cannot crop 40 tokens off a cache"):
                cache.crop(-40)
            cache.crop(-5)
            assert {int(layer.get_seq_length()) for layer in cache.layers} == {length - 5}
            seven = torch.full((3, 1), 7)
            out = model(input_ids=seven, attention_mask=mask, past_key_values=cache)
            logits.append(out.logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


@pytest.mark.skipif(VERSION < (5, 23), reason="plain decode steps break graphs themselves")
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("spec", SPECS)
def test_generate_compiles_decode_steps_once(spec: str, rows: int) -> None:
    """By itself, as `generate` does on a GPU; here on a CPU, and without inductor."""
    torch._dynamo.reset()
    if torch.__version__.startswith(f"{library('torch').oldest}."):
        pytest.skip("this torch cannot compile a model of transformers, attached or not")
    model, inputs = tiny_llava(), collate(prompts()[:rows])
    compiled = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    with tokenprune.attach(model, spec):
        wanted = generate(model, inputs, steps=12)
        counters.clear()
        got = generate(
            model, inputs, steps=12, cache_implementation="static", compile_config=compiled
        )
    assert torch.equal(got.text, wanted.text)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_a_cache_allocated_by_the_caller_keeps_its_slots() -> None:
    model, inputs = tiny_llava(), collate(prompts()[:1])
    cache = StaticCache(config=model.config.text_config, max_cache_len=60)
    text = model.config.text_config
    shape = {"batch_size": 1, "num_heads": text.num_key_value_heads, "head_dim": text.head_dim}
    cache.early_initialization(**shape, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad(), tokenprune.attach(model, f"{BEFORE}; {AFTER}"):
        got = model(**inputs, past_key_values=cache).logits
        wanted = model(**inputs).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    assert widths(cache) == [60, 60, 60]


def test_windows_are_refused() -> None:
    model = tiny_llava()
    window = MistralConfig(**(model.config.text_config.to_dict() | {"sliding_window": 8}))
    cache = StaticCache(config=window, max_cache_len=60)
    with (
        tokenprune.attach(model, BEFORE),
        pytest.raises(UnsupportedError, match="StaticSlidingWindowLayer.*without sliding windows"),
    ):
        model(**collate(prompts()), past_key_values=cache)


def test_flash_attention_is_refused() -> None:
    model, inputs = tiny_llava(), collate(prompts())
    cache = StaticCache(config=model.config.text_config, max_cache_len=60)
    with tokenprune.attach(model, BEFORE):
        model.model.language_model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(UnsupportedError, match="FlashAttention takes slots.*yet to be filled"):
            model(**inputs, past_key_values=cache)


def test_masks_with_columns_of_their_own_are_refused() -> None:
    """A causal 4-D mask is read; one that says more would be wrong without what it says."""
    model, inputs = tiny_llava(), collate(prompts()[:1])
    width = inputs["input_ids"].shape[1]
    causal = torch.ones(1, 1, width, width, dtype=torch.bool).tril()
    blind = causal.clone()
    blind[..., 3:, 1] = False
    blind[..., -1, 1] = True
    with torch.no_grad(), tokenprune.attach(model, BEFORE):
        wanted = model(**inputs).logits
        got = model(**(inputs | {"attention_mask": causal})).logits
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
        for odd in (blind, ~causal, torch.where(causal, 0.5, -torch.inf)):
            with pytest.raises(UnsupportedError, match="attention_mask"):
                model(**(inputs | {"attention_mask": odd}))
    assert width > PATCHES
