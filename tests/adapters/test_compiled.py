"""`torch.compile`, whose code does not see hooks that come or go: attaching makes it look again.

The backend runs the traced graphs as they are: what can go wrong is in the tracing.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import tokenprune
from support.llava import collate, prompts, tiny_llava

STAGES = ("cls-attention(layers=1) | evict(9) @ before-llm", "fastv | evict(4) @ after-layer(1)")


@pytest.fixture(autouse=True)
def _start_uncompiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch.no_grad()
def test_a_model_compiled_before_attaching_is_compressed_and_restored() -> None:
    model, inputs = tiny_llava(layers=(2, 2)), collate(prompts()[:1])
    vanilla = model(**inputs).logits
    with tokenprune.attach(model, *STAGES):
        wanted = model(**inputs).logits
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(**inputs).logits, vanilla)
    with tokenprune.attach(model, *STAGES) as attachment:
        torch.testing.assert_close(compiled(**inputs).logits, wanted, rtol=0, atol=1e-5)
    assert attachment.report.layers == ((0, 9), (1, 4))
    assert torch.equal(compiled(**inputs).logits, vanilla)
