"""The adapters that come along keep the contract, on tiny random models of transformers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from support import llava_next, oracle
from support.llava import BOS, Row, collate, generate, picture, prompts, tiny_llava
from tokenprune import (
    AfterLayer,
    BeforeLLM,
    ClsAttention,
    JointClsAttention,
    Keys,
    Placement,
    Signal,
    UnsupportedError,
    observe,
)
from tokenprune.testing import ModelCase, Prompt, TowerCase, parametrize_with_checks
from tokenprune_adapters.kit.peaked_weights import peaked


def pictures() -> dict[str, Any]:
    return {"pixel_values": torch.stack([picture(n) for n in range(3)])}


def clip(attention: str) -> nn.Module:
    return tiny_llava(attention).model.vision_tower


def siglip() -> nn.Module:
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SiglipVisionModel(config).eval()


TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "patch_size": 8,
}


def dinov2(registers: int) -> nn.Module:
    more = TINY | {"image_size": 32, "num_register_tokens": registers}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if registers:
            return peaked(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**more)))
        return peaked(Dinov2Model(Dinov2Config(**more)))


def siglip2() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peaked(Siglip2VisionModel(Siglip2VisionConfig(**TINY, num_patches=16)))


def patches_in_a_row(shape: tuple[int, int] = (4, 4)) -> dict[str, Any]:
    whole = torch.stack([picture(n) for n in range(3)])
    rows = rearrange(whole, "b c (h high) (w wide) -> b (h w) (c high wide)", high=8, wide=8)
    mask = torch.ones(3, 16, dtype=torch.int32)
    mask[0, shape[0] * shape[1] :] = 0
    return {
        "pixel_values": rows,
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([shape, (4, 4), (4, 4)]),
    }


def states(tower: nn.Module, inputs: dict[str, Any], layer: int) -> Tensor:
    """What enters a block (with padding tokens such as [CLS]), by transformers' own output."""
    hidden: Tensor = tower(**inputs, output_hidden_states=True).hidden_states[layer]
    return hidden


def of_tower(prefix: int, tower: Any, inputs: dict[str, Any], signal: Signal) -> Tensor:
    """Signals from full attention maps and from hidden states, without hooks."""
    encoder = getattr(tower, "vision_model", tower).encoder
    if isinstance(signal, Keys):
        block = (encoder.layer if hasattr(encoder, "layer") else encoder.layers)[signal.layer]
        norm, attention = (
            (block.norm1, block.attention)
            if hasattr(block, "norm1")
            else (block.layer_norm1, block.self_attn)
        )
        x = norm(states(tower, inputs, signal.layer - 1))
        keys = attention.k_proj(x)[:, prefix:]
        return keys.unflatten(2, (4, -1)).transpose(1, 2)
    assert isinstance(signal, (ClsAttention, JointClsAttention))
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    maps = tower(**inputs, output_attentions=True).attentions
    tower.set_attn_implementation(before)
    # K = 2 means the two that end at the features, here those of the last but one block.
    numbers = (-3, -2) if isinstance(signal.layers, int) else signal.layers
    rows = torch.stack([maps[number][:, :, 0] for number in numbers], dim=1)
    if isinstance(signal, JointClsAttention):  # the whole map has the column of [CLS]
        heads = rows.shape[2]
        rows = (rows.double().log().sum(2) / heads**0.5).softmax(-1)
    return rows[..., prefix:]


def towers() -> Iterable[TowerCase]:
    for attention in ("sdpa", "eager"):
        yield TowerCase(
            f"CLIP with {attention}",
            partial(clip, attention),
            pictures,
            [ClsAttention(2), ClsAttention((-1, -4)), JointClsAttention((-1, -4)), Keys(-2)],
            features=lambda tower, inputs: states(tower, inputs, -2)[:, 1:],
            oracle=partial(of_tower, 1),
        )
    yield TowerCase(
        "SigLIP",
        siglip,
        pictures,
        [Keys(-1), Keys(-2)],
        feature_layer=-1,
        features=lambda tower, inputs: states(tower, inputs, -1),
        oracle=partial(of_tower, 0),
    )

    for registers in (0, 3):
        yield TowerCase(
            f"DINOv2 with {registers} registers",
            partial(dinov2, registers),
            pictures,
            [ClsAttention(2), ClsAttention((-1, -4)), JointClsAttention((-1, -4)), Keys(-2)],
            features=lambda tower, inputs, n=registers: states(tower, inputs, -2)[:, 1 + n :],
            oracle=partial(of_tower, 1 + registers),
        )
    yield TowerCase(
        "SigLIP2",
        siglip2,
        patches_in_a_row,
        [Keys(-1), Keys(-2)],
        feature_layer=-1,
        features=lambda tower, inputs: states(tower, inputs, -1),
        oracle=partial(of_tower, 0),
    )


def test_padded_pictures_of_siglip2_are_refused() -> None:
    tower = siglip2()
    with (
        observe(tower, [Keys(-1)]),
        pytest.raises(UnsupportedError, match="fewer patches than oth"),
    ):
        tower(**patches_in_a_row((2, 4)))


def llava_prompts() -> list[Prompt]:
    """With text between the prompts with images in length, before and after these are shortened."""
    rows = [*prompts()[:2], Row([BOS, *range(31, 54)])]
    return [Prompt(row, len(row.ids), (16,) * len(row.images)) for row in rows]


def llava_batch(batch: Sequence[Prompt]) -> dict[str, Any]:
    return collate([prompt.inputs for prompt in batch])


def llava_text(model: nn.Module, inputs: dict[str, Any], steps: int) -> tuple[Tensor, Tensor]:
    answer = generate(model, inputs, steps)
    return answer.text, answer.logits


def by_hand(
    model: Any, prompt: Prompt, kept: list[list[int]], placement: Placement, steps: int
) -> Tensor:
    assert isinstance(placement, BeforeLLM)
    return oracle.greedy(model, prompt.inputs, kept, steps, placement.positions or "reindexed")[1]


def models() -> Iterable[ModelCase]:
    for attention in ("sdpa", "eager"):
        yield ModelCase(
            f"LLaVA with {attention}, before the LLM",
            partial(tiny_llava, attention),
            llava_prompts,
            llava_batch,
            placements=[BeforeLLM(), BeforeLLM("original")],
            generate=llava_text,
            oracle=by_hand,
            wraps=["model.get_image_features"],
        )
    yield ModelCase(
        "LLaVA, inside the LLM",
        tiny_llava,
        llava_prompts,
        llava_batch,
        placements=[
            AfterLayer(1),
            AfterLayer(2, "reindexed"),
            (AfterLayer(1, "reindexed"), AfterLayer(2)),
            (BeforeLLM("original"), AfterLayer(1)),
        ],
        generate=llava_text,
        wraps=["model.get_image_features"],
    )


def next_prompts() -> list[Prompt]:
    """Newlines are text: they are never counted, and always kept."""
    made = []
    text = llava_next.Prompt([BOS, *range(10, 76)])
    for prompt in [*llava_next.prompts()[:2], text]:
        visual = tuple(sum(t is not None for t in each.packed) for each in prompt.pictures)
        made.append(Prompt(prompt, len(prompt.ids), visual))
    return made


def llava_next_case() -> ModelCase:
    return ModelCase(
        "LLaVA-NeXT",
        llava_next.tiny_llava_next,
        next_prompts,
        lambda batch: llava_next.collate([prompt.inputs for prompt in batch]),
        placements=[BeforeLLM(), AfterLayer(2, "reindexed"), (BeforeLLM(), AfterLayer(1))],
        generate=llava_text,
        wraps=["model.get_image_features"],
    )


@parametrize_with_checks([*towers(), *models(), llava_next_case()])
def test_contract(case, check):
    check(case)
