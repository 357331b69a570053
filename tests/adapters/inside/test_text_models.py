"""`fastv` in text models of many kinds: the rows are those of the model's own attention.

Served and equal to the eager map, or refused when attaching with the reason. Nobody computes rows
anew from projections, so norms, clipping, partial rotation and layers without rotation all count.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

import tokenprune
from support.llava import BOS, EOS, IMAGE, PAD, PATCHES, collate, prompts, scale
from tokenprune import UnsupportedError

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
ALL_HEADS = {"num_key_value_heads": 4}

SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", {}),
    "Mistral": ("MistralConfig", {"sliding_window": None}),
    "Qwen2": ("Qwen2Config", {}),
    "Qwen3, norms of queries and keys": ("Qwen3Config", {"head_dim": 16}),
    "Phi, partial rotation": ("PhiConfig", {"partial_rotary_factor": 0.5}),
    "Phi, norms": ("PhiConfig", {"qk_layernorm": True, **ALL_HEADS}),
    "Phi-3, one projection": ("Phi3Config", {"sliding_window": None}),
    "StableLM, partial rotation": ("StableLmConfig", {"partial_rotary_factor": 0.25}),
    "StableLM, norms": ("StableLmConfig", {"qk_layernorm": True, "partial_rotary_factor": 0.5}),
    "OLMo, clipped": ("OlmoConfig", {"clip_qkv": 0.3}),
    "OLMo-2, norms": ("Olmo2Config", {}),
    "Cohere, norms": ("CohereConfig", {"use_qk_norm": True}),
    "Hunyuan, norms": ("HunYuanDenseV1Config", {"head_dim": 8}),
    "SmolLM3, layers without rotation": ("SmolLM3Config", {"no_rope_layers": [1, 0, 1]}),
    "Granite, own scaling": ("GraniteConfig", {"attention_multiplier": 0.3}),
    "GLM": ("GlmConfig", {"head_dim": 8}),
    "GLM-4": ("Glm4Config", {"head_dim": 8}),
    "GPT-NeoX, one projection": ("GPTNeoXConfig", {"rotary_pct": 0.5}),
    "Starcoder2": ("Starcoder2Config", {"sliding_window": None}),
    "Nemotron": ("NemotronConfig", {"head_dim": 8}),
    "Gemma": ("GemmaConfig", {"head_dim": 8}),
    "Helium": ("HeliumConfig", {"head_dim": 8}),
    "Ernie 4.5": ("Ernie4_5Config", {"head_dim": 8}),
    "Arcee": ("ArceeConfig", {}),
    "DiffLlama, differences of maps": ("DiffLlamaConfig", {}),
    "OLMoE, experts": ("OlmoeConfig", {}),
    "Gemma-2, capped": (
        "Gemma2Config",
        {"head_dim": 8, "layer_types": ["full_attention"] * 3, "attn_logit_softcapping": 2.0},
    ),
    "GPT-OSS, sinks": (
        "GptOssConfig",
        {"head_dim": 8, "layer_types": ["full_attention"] * 3, "num_local_experts": 4},
    ),
    "Doge, masks of its own": ("DogeConfig", {"keep_window_size": 4, **ALL_HEADS}),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Gemma-2, windows": ("Gemma2Config", {"head_dim": 8}, "only full attention is supported"),
    "Mistral, windows": ("MistralConfig", {"sliding_window": 8}, "only full attention"),
    "Gemma-3, an embedding for each kind of layer": (
        "Gemma3TextConfig",
        {"head_dim": 8, "layer_types": ["full_attention"] * 3},
        "wants layer_type beside states and positions",
    ),
    "Qwen3-Next, recurrent layers": (
        "Qwen3NextConfig",
        {},
        "linear_attention layers, whose states run",
    ),
}


def tiny(name: str, options: dict[str, Any], attention: str = "sdpa") -> Any:
    text = getattr(transformers, name)(**{**SIZES, **options})
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=PATCHES,
        attn_implementation=attention,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval()
    scale(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for module_name, weight in model.model.language_model.named_parameters():
            if any(part in module_name for part in ("qkv_proj", "query_key_value")):
                weight.mul_(1.5)
    return model


@torch.no_grad()
def own_scores(model: Any, inputs: dict[str, Tensor], layer: int) -> Tensor:
    """`(images, patches)` head means of the last token's row of the model's own eager map."""
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        maps = model(**inputs, output_attentions=True, use_cache=False).attentions[layer]
    finally:
        model.set_attn_implementation(before)
    found = []
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        visual = [slot for slot, each in enumerate(ids) if each == IMAGE]
        found += [
            maps[row, :, -1, visual[start : start + PATCHES]].mean(0)
            for start in range(0, len(visual), PATCHES)
        ]
    return torch.stack(found)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("name", SERVED)
def test_rows_are_those_of_the_models_own_attention(name: str, layer: int) -> None:
    # Gemma-2 and GPT-OSS have no sdpa.
    attention = "eager" if name.startswith(("Gemma-2", "GPT-OSS")) else "sdpa"
    model, inputs = tiny(*SERVED[name], attention), collate(prompts())
    wanted = own_scores(model, inputs, layer - 1)
    with torch.no_grad():
        real = inputs["attention_mask"].bool()
        stock = model(**inputs).logits[real]
        with tokenprune.attach(model, f"fastv | evict({PATCHES}) @ after-layer({layer})") as all_:
            assert torch.equal(model(**inputs).logits[real], stock)
        with tokenprune.attach(model, f"fastv | evict(4) @ after-layer({layer})") as some:
            model(**inputs)
        assert torch.equal(model(**inputs).logits[real], stock)
    for attachment in (all_, some):
        scores = attachment.last.scores
        assert scores is not None
        torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=2e-6)
    best = wanted.argsort(dim=1, descending=True, stable=True)[:, :4].sort(1).values
    assert torch.equal(some.last.plan.anchors, best)
    assert wanted.std(1).min() > 1e-4  # there is something to rank


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_when_attaching(name: str) -> None:
    config, options, words = REFUSED[name]
    model = tiny(config, options, "eager")
    with pytest.raises(UnsupportedError, match=words):
        tokenprune.attach(model, "fastv | evict(4) @ after-layer(1)")


def test_rows_that_never_came_are_refused_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in words, not zeros: an attention that goes another way while it is attached."""
    model = tiny("LlamaConfig", {})
    attention = model.model.language_model.layers[0].self_attn
    with torch.no_grad(), tokenprune.attach(model, "fastv | evict(4) @ after-layer(1)"):
        monkeypatch.setattr(
            attention, "forward", lambda hidden_states, **rest: (hidden_states, None)
        )
        with pytest.raises(UnsupportedError, match="has not called its attention function"):
            model(**collate(prompts()))
