"""Models inside of what other libraries put around them: seen through, or refused in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tokenprune
from support.llava import collate, generate, prompts, spec, tiny_llava
from support.oracle import greedy_batch
from tokenprune.wrappers import unwrapped


def close(given: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(given, wanted, atol=2e-4, rtol=1e-4)


def lora(model: nn.Module) -> Any:
    """LoRA in tower and LLM, with updates large enough to change every answer."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    torch.manual_seed(0)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize(
    "stage", [spec(4), "fastv | evict(5) @ after-layer(1)", "tome(6) @ before-llm"]
)
def test_lora_is_compressed_as_its_merged_weights_are(stage: str) -> None:
    wrapped = lora(tiny_llava())
    vanilla = generate(wrapped, collate(prompts()))
    with tokenprune.attach(wrapped, stage) as attachment:
        answer = generate(wrapped, collate(prompts()))
    assert attachment.report.tokens_after < attachment.report.tokens_before
    assert torch.equal(generate(wrapped, collate(prompts())).logits, vanilla.logits)
    merged = wrapped.merge_and_unload()
    with tokenprune.attach(merged, stage):
        wanted = generate(merged, collate(prompts()))
    assert not torch.equal(answer.logits, vanilla.logits)
    assert torch.equal(answer.text, wanted.text)
    close(answer.logits, wanted.logits)


def test_merged_lora_answers_as_kept_embeddings_do() -> None:
    merged = lora(tiny_llava()).merge_and_unload()
    text, logits = greedy_batch(merged, prompts(), 4)
    with tokenprune.attach(merged, spec(4)):
        answer = generate(merged, collate(prompts()))
    assert torch.equal(answer.text, text)
    close(answer.logits, logits)


def test_a_wrapper_and_its_model_cannot_both_be_attached() -> None:
    wrapped = lora(tiny_llava())
    with (
        tokenprune.attach(wrapped, spec(4)),
        pytest.raises(tokenprune.AttachError, match="already attached"),
    ):
        tokenprune.attach(wrapped.get_base_model(), spec(4))


def test_prompt_tuning_is_refused() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=2,
        num_layers=2,
        token_dim=32,
        num_attention_heads=4,
    )
    wrapped = peft.PeftModel(tiny_llava(), config)
    with pytest.raises(tokenprune.UnsupportedError, match="virtual tokens in front of the prompt"):
        tokenprune.attach(wrapped, spec(4))


def test_distributed_data_parallel(tmp_path) -> None:
    model = tiny_llava()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        with torch.no_grad():
            with tokenprune.attach(model, spec(4)):
                wanted = model(**collate(prompts())).logits
            with tokenprune.attach(wrapped, spec(4)):
                given = wrapped(**collate(prompts())).logits
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(given, wanted)


def test_data_parallel_is_refused() -> None:
    with pytest.raises(tokenprune.UnsupportedError, match="DistributedDataParallel"):
        tokenprune.attach(nn.DataParallel(tiny_llava()), spec(4))


def test_what_torch_compile_returns_is_seen_through() -> None:
    model = tiny_llava()
    assert unwrapped(torch.compile(model, backend="eager")) is model
    assert unwrapped(model) is model
