"""Shared tiny models, and a check that no test leaves anything on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TypeAlias

import pytest
from torch import nn
from transformers import LlavaForConditionalGeneration

from support.llava import tiny_llava

MakeLlava: TypeAlias = Callable[..., LlavaForConditionalGeneration]

_shared = lru_cache(tiny_llava)


def leftovers(model: nn.Module) -> list[str]:
    """Hooks of tokenprune on `model`; others prove nothing, since transformers leaves some."""
    return [
        f"{name}: {hook}"
        for name, module in model.named_modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for hook in hooks.values()
        if "tokenprune" in (getattr(hook, "__module__", None) or "")
    ]


@pytest.fixture
def llava() -> Iterator[MakeLlava]:
    """Makes tiny models, shared by tests with equal arguments: each must leave them clean."""
    used: list[nn.Module] = []

    def make(attention: str = "sdpa", **options: object) -> LlavaForConditionalGeneration:
        used.append(_shared(attention, **options))
        return used[-1]

    yield make
    for model in used:
        assert leftovers(model) == []
