"""Families inside of what people wrap models in: LoRA, offloaded and quantised layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tokenprune
from support.families import FAMILIES, case_of
from tokenprune_adapters.hf.contract import CHECKS

TWO = pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl", "internvl", "smolvlm"])
BY = {check.__name__[6:8]: check for check in CHECKS}
NAMED = {tiny.name: tiny for tiny in FAMILIES}


def spec(case: Any) -> str:
    first = f"received-attention | {case.budget('evict', 6)}"
    return f"{first}; fastv | {case.budget('evict', 3)} @ after-layer(2)"


def answers(case: Any, model: Any, attached: Any = None) -> torch.Tensor:
    with torch.no_grad(), tokenprune.attach(attached or model, spec(case)):
        logits: torch.Tensor = model(**case.inputs((0, 1))).logits
    return logits


@TWO
def test_lora_is_pruned_as_its_merged_weights_are(name: str) -> None:
    peft = pytest.importorskip("peft")
    case = case_of(NAMED[name])
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj", "qkv"], init_lora_weights=False
    )
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(case.build("sdpa"), config).eval()
    got = answers(case, wrapped)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(got, answers(case, merged), atol=2e-4, rtol=0)


@TWO
def test_layers_on_disk_are_pruned_as_in_memory(name: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    case = case_of(NAMED[name])
    wanted, model = answers(case, case.build("sdpa")), case.build("sdpa")
    parts = case.anatomy(model)
    path = next(key for key, each in model.named_modules() if each is parts.llm)
    layers = {f"{path}.layers.{n}": ("cpu", "disk")[n % 2] for n in range(len(parts.llm.layers))}
    rest = [f"model.{key}" for key, each in parts.core.named_children() if each is not parts.llm]
    rest += [f"{path}.{key}" for key, _ in parts.llm.named_children() if key != "layers"]
    placed = dict.fromkeys([*rest, "lm_head"], "cpu")
    accelerate.dispatch_model(
        model, placed | layers, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    assert next(parts.llm.layers[1].parameters()).is_meta
    torch.testing.assert_close(answers(case, model), wanted, atol=1e-5, rtol=0)


class Int8(nn.Module):
    """Stand-in for a quantised linear layer: its weights are no floats, and have another shape."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1) / 127
        self.register_buffer("scale", scale)
        packed = (linear.weight.detach() / scale[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(packed.flatten(), requires_grad=False)
        self.bias = linear.bias
        self.in_features = linear.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.reshape(-1, self.in_features) * self.scale[:, None]
        return nn.functional.linear(x, weight, self.bias)


def quantised(model: nn.Module) -> int:
    """Replace the linear layers of decoder layers and of the tower; how many."""
    count = 0
    for name, module in list(model.named_modules()):
        for key, child in list(module.named_children()):
            if type(child) is nn.Linear and "lm_head" not in f"{name}.{key}":
                setattr(module, key, Int8(child))
                count += 1
    return count


@TWO
def test_quantised_layers_are_pruned_as_the_oracle_says(name: str) -> None:
    """By weights that are no floats, as those of bitsandbytes, GPTQ, AWQ and FP8."""
    case = case_of(NAMED[name])

    def build(attention: str) -> Any:
        model = case.build(attention)
        assert quantised(model) > 20
        return model

    BY["f3"](replace(case, build=build, tolerance=2e-4))
    model = build("sdpa")
    assert answers(case, model).isfinite().all()


@pytest.mark.parametrize("name", ["llava", "llava-next", "qwen2.5-vl", "internvl"])
def test_a_model_may_change_its_dtype_while_it_is_attached(name: str) -> None:
    """Features are known again by what they are in the language model's own dtype."""
    case = case_of(NAMED[name])
    ranked = f"received-attention(layers=1) | {case.budget('evict', 3)} @ after-layer(2)"
    stages = f"uniform | {case.budget('evict', 6)}; {ranked}"
    inputs = case.inputs((0, 1))
    model = case.build("sdpa").bfloat16().float()  # weights that both dtypes hold
    with torch.no_grad():
        with tokenprune.attach(model, stages):
            wanted = model(**inputs).logits
        model.bfloat16()
        with tokenprune.attach(model, stages):
            model.float()
            got = model(**inputs).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
