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


def test_adapters_cannot_be_put_into_an_attached_tower() -> None:
    """Hooks would stay on the plain projections inside, whose scores lack what LoRA adds."""
    model = tiny_llava()
    with tokenprune.attach(model, spec(4)), pytest.raises(tokenprune.AttachError, match="q_proj"):
        generate(lora(model), collate(prompts()))
    with tokenprune.attach(model, spec(4)) as attachment:
        generate(model, collate(prompts()))
    assert attachment.report.calls == 1


def test_adapters_cannot_be_merged_away_from_an_attached_tower() -> None:
    """But they may be merged and stay where they are."""
    wrapped = lora(tiny_llava())
    with tokenprune.attach(wrapped, spec(4)):
        apart = generate(wrapped, collate(prompts()))
        wrapped.merge_adapter()
        merged = generate(wrapped, collate(prompts()))
        wrapped.unmerge_adapter()
        with pytest.raises(tokenprune.AttachError, match="q_proj or k_proj of the CLIPVisionModel"):
            generate(wrapped.merge_and_unload(), collate(prompts()))
    close(merged.logits, apart.logits)


@pytest.mark.parametrize("stage", [spec(4), "fastv | evict(5) @ after-layer(1)"])
def test_a_projector_that_is_put_back_while_attached(stage: str) -> None:
    """PEFT saves it beside LoRA by putting a module around it, which merging takes away."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=r".*language_model.*q_proj", modules_to_save=["multi_modal_projector"]
    )
    wrapped = peft.get_peft_model(tiny_llava(), config).eval()
    with tokenprune.attach(wrapped, stage) as attachment:
        generate(wrapped, collate(prompts()))
        assert attachment.report.tokens_after < attachment.report.tokens_before
        plain = wrapped.merge_and_unload()
        with pytest.raises(tokenprune.AttachError, match="multi_modal_projector .* was replaced"):
            generate(plain, collate(prompts()))
    with tokenprune.attach(plain, stage) as attachment:
        generate(plain, collate(prompts()))
    assert attachment.report.tokens_after < attachment.report.tokens_before


def test_parts_that_are_wrapped_while_attached_keep_their_hooks() -> None:
    model = tiny_llava()
    with tokenprune.attach(model, spec(4)) as attachment:
        wanted = generate(model, collate(prompts()))
        projector = model.model.multi_modal_projector
        model.model.multi_modal_projector = nn.Sequential(projector)
        got = generate(model, collate(prompts()))
    assert torch.equal(got.logits, wanted.logits)
    assert attachment.report.calls == 2


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
