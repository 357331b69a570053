"""`torch.compile`, whose code does not see hooks that come or go: attaching makes it look again.

The backend runs the traced graphs as they are: what can go wrong is in the tracing.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import tokenprune
from support.llava import collate, prompts, tiny_llava
from tokenprune import ClsAttention, UnsupportedError
from tokenprune.versions import library


@pytest.fixture(autouse=True)
def _start_uncompiled() -> Iterator[None]:
    torch.compiler.reset()
    if torch.__version__.startswith(f"{library('torch').oldest}."):
        model, inputs = tiny_llava(layers=(1, 1)), collate(prompts()[:1])
        try:
            torch.compile(model, backend="eager")(**inputs)
        except Exception:  # of tracing, another one on every release of transformers
            pytest.skip("this torch cannot compile a model of transformers, attached or not")
    yield
    torch.compiler.reset()


@torch.no_grad()
def test_a_model_compiled_before_attaching_is_compressed_and_restored() -> None:
    model, inputs, spec = tiny_llava(layers=(2, 1)), collate(prompts()[:1]), "random | evict(9)"
    vanilla = model(**inputs).logits
    with tokenprune.attach(model, spec):
        wanted = model(**inputs).logits
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(**inputs).logits, vanilla)
    with tokenprune.attach(model, spec):
        torch.testing.assert_close(compiled(**inputs).logits, wanted, rtol=0, atol=1e-5)
    assert torch.equal(compiled(**inputs).logits, vanilla)


@torch.no_grad()
def test_an_attached_model_can_be_compiled() -> None:
    model, inputs = tiny_llava(layers=(2, 2)), collate(prompts()[:1])
    with tokenprune.attach(model, "fastv | evict(4) @ after-layer(1)"):
        wanted = model(**inputs).logits
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(**inputs).logits, wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_prompts_of_other_lengths_follow() -> None:
    """From the second length on, torch.compile traces with lengths that it does not know."""
    model, short, long = tiny_llava(layers=(2, 1)), prompts()[:1], prompts()[1:2]
    with tokenprune.attach(model, "random | evict(9)") as attachment:
        compiled = torch.compile(model, backend="eager")
        for batch in (short, long):
            inputs = collate(batch)
            wanted, bytes_ = model(**inputs).logits, attachment.report.kv_bytes
            got = compiled(**inputs).logits
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
            assert attachment.report.kv_bytes == bytes_


@torch.no_grad()
def test_hooks_on_some_blocks_of_a_tower_are_seen_where_blocks_are_compiled_one_by_one() -> None:
    """torch.compile runs the code of one block for all of them, and looks at no hooks."""
    model, inputs = tiny_llava(layers=(4, 2)), collate(prompts()[:1])
    for block in model.model.vision_tower.encoder.layers:
        block.mlp.register_forward_hook(lambda *args: torch._dynamo.graph_break())
    with tokenprune.attach(model, "cls-attention(layers=[0, 2]) | evict(4)"):
        wanted = model(**inputs).logits
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(**inputs).logits, wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_tower_compiled_by_itself_says_what_it_cannot_see() -> None:
    tower = tiny_llava(layers=(4, 1)).model.vision_tower
    for block in tower.encoder.layers:
        block.mlp.register_forward_hook(lambda *args: torch._dynamo.graph_break())
    compiled = torch.compile(tower, backend="eager")
    with (
        tokenprune.observe(tower, [ClsAttention(layers=(1, 2))]),
        pytest.raises(UnsupportedError, match=r"torch.compiler.disable\(tower.forward\)"),
    ):
        compiled(torch.rand(1, 3, 32, 32))
