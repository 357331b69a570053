"""PruMerge's attention, one head over all channels, read from queries and keys of a tower.

It was once made of the heads' own rows, with [CLS]'s share as what they lack of 1: a difference of
float32 numbers near 1, which is off by more than itself where the share is small.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tokenprune
from reference.plain import single_head
from support.llava import picture, tiny_llava
from tokenprune import JointClsAttention, Keys, PruMerge, Signals, VisualTokens
from tokenprune.kept_patches import Origin
from tokenprune_adapters.kit.attention_rows import attention, joint_attention, products
from tokenprune_adapters.kit.budget_rows import BudgetRows

IMAGES = torch.stack([picture(seed) for seed in range(8)])
LAYERS = (-1, 1)
SIGNAL = JointClsAttention(LAYERS)


def sharp(scale: float) -> Any:
    """A CLIP tower whose attention logits are `scale` times as large."""
    tower = copy.deepcopy(tiny_llava("sdpa").model.vision_tower)
    for block in getattr(tower, "vision_model", tower).encoder.layers:
        block.self_attn.q_proj.weight.data *= scale
        block.self_attn.q_proj.bias.data *= scale
    return tower


def seen(tower: Any, images: Tensor = IMAGES) -> Tensor:
    with torch.no_grad(), tokenprune.observe(tower, [SIGNAL]) as observation:
        tower(pixel_values=images)
        return observation.signals[SIGNAL]


def by_definition(tower: Any) -> np.ndarray:
    """`(images, layers, patches)` in float64, from the layers' own inputs, [CLS]'s column true."""
    inner = getattr(tower, "vision_model", tower)
    with torch.no_grad():
        states = tower(pixel_values=IMAGES, output_hidden_states=True).hidden_states
    found = []
    for layer in LAYERS:
        number = layer % len(inner.encoder.layers)
        block = copy.deepcopy(inner.encoder.layers[number]).double()
        x = block.layer_norm1(states[number].double())
        heads = block.self_attn.num_heads
        query = block.self_attn.q_proj(x[:, :1]).unflatten(2, (heads, -1)).transpose(1, 2)
        keys = block.self_attn.k_proj(x).unflatten(2, (heads, -1)).transpose(1, 2)
        logits = (query @ keys.mT)[:, :, 0] / query.shape[-1] ** 0.5
        found.append([single_head(one)[1:] for one in logits.detach().numpy()])
    return np.array(found).transpose(1, 0, 2)


@pytest.mark.parametrize("scale", [1.0, 6.0, 40.0])
def test_the_column_of_cls_is_that_of_the_tower(scale: float) -> None:
    tower = sharp(scale)
    got, wanted = seen(tower).double().numpy(), by_definition(tower)
    assert got.shape == (8, 2, 16)
    off = np.abs(got - wanted) / np.maximum(wanted, 1e-12)
    assert off.max() < 1e-2 * max(scale / 6, 1)
    assert np.median(off) < 1e-4 * max(scale / 6, 1)


def test_one_picture_alone_and_in_a_batch_has_the_same_attention() -> None:
    tower = sharp(6.0)
    together = seen(tower)
    for number in range(len(IMAGES)):
        alone = seen(tower, IMAGES[number : number + 1])
        torch.testing.assert_close(together[number : number + 1], alone, rtol=1e-3, atol=1e-9)


def test_the_heads_own_rows_could_not_tell_it() -> None:
    """Why it is a signal of its own: what float32 rows lack of 1 is mostly rounding here."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(200, 4, 1, 8, generator=generator) * 6
    keys = torch.randn(200, 4, 17, 8, generator=generator)
    rows = attention(query, keys)[:, :, 0]
    own = (1 - rows[:, :, 1:].sum(2)).clamp(min=torch.finfo(torch.float32).tiny)
    rebuilt = torch.cat([own[:, :, None], rows[:, :, 1:].clamp(min=1e-38)], 2).double().log()
    rebuilt = (rebuilt.sum(1) / 2).softmax(1)[:, 1:]
    true = joint_attention(products(query, keys)[:, :, 0])[:, 1:].double()
    off = ((rebuilt - true).abs() / true).amax(1)
    assert float((off > 0.01).double().mean()) > 0.02


def test_crops_keep_the_attention_of_their_own_cls() -> None:
    """A row of several crops holds several rows of attention, and none is scaled anew."""
    crops = torch.rand(3, 1, 4)
    joint = crops / crops.sum(-1, keepdim=True) * 0.7
    origins = [Origin(0, patches_per_crop=4), Origin(1, patches_per_crop=4)]
    rows = BudgetRows.of([torch.arange(8), torch.arange(8, 12)], 4, origins)
    given = rows.signals(Signals({JointClsAttention(1): joint}))[JointClsAttention(1)]
    assert torch.equal(given[0, 0], joint[:2].flatten())
    assert torch.equal(given[1, 0, :4], joint[2, 0])


def test_an_earlier_reducer_does_not_change_it() -> None:
    reducer = PruMerge(3)
    joint = torch.tensor([[[0.1, 0.2, 0.05, 0.3, 0.25]]])
    signals = Signals({JointClsAttention((-1,)): joint, Keys(-1): torch.rand(1, 1, 5, 2)})
    tokens = VisualTokens.of(torch.rand(1, 5, 2))
    plan = tokenprune.Plan.select(torch.tensor([[True, True, False, True, True]]))
    attention = reducer.attention(tokens.reduce(plan), signals.reduce(plan))
    assert attention.tolist() == joint[0, :, [0, 1, 3, 4]].tolist()
