"""A release that renames an argument: refused in words, and served once the wall knows the name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import tokenprune
from support import oracle
from support.llava import collate, generate, prompts, spec, tiny_llava
from support.outputs import cache_argument
from tokenprune import UnsupportedError
from tokenprune.versions import library
from tokenprune_adapters.hf.names import Call

INSIDE = "uniform | evict(4) @ after-layer(1, positions='original')"

LLM = [
    ("embeds", "inputs_embeds"),
    ("mask", "attention_mask"),
    ("positions", "position_ids"),
    ("cache", cache_argument()),
]
LAYER = [
    ("hidden", "hidden_states"),
    ("rotary", "position_embeddings"),
    ("mask", "attention_mask"),
    ("cache", cache_argument()),
]
CORE = [
    ("ids", "input_ids"),
    ("mask", "attention_mask"),
    ("encoded", "mm_encoder_outputs"),
    ("cache", cache_argument()),
]
PLACES = [
    *(("core", *each) for each in CORE),
    *(("llm", *each) for each in LLM),
    *(("layer", *each) for each in LAYER),
    ("tower", "pixels", "pixel_values"),
]


def rename(module: nn.Module, old: str, new: str) -> None:
    """Let `module` take `new` where it took `old`, and its callers pass it so."""
    cls: Any = type(module)
    original = inspect.signature(cls.forward)

    class Renamed(cls):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **{new if k == old else k: v for k, v in kwargs.items()})

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            given = {old if k == new else k: v for k, v in kwargs.items()}
            return super().forward(*args, **given)

    taken = [
        each.replace(name=new) if each.name == old else each
        for each in original.parameters.values()
    ]
    Renamed.forward.__signature__ = original.replace(parameters=taken)
    Renamed.__name__ = cls.__name__
    module.__class__ = Renamed


def renamed(role: str, old: str) -> Any:
    model: Any = tiny_llava()
    llm = model.model.language_model
    modules = {
        "core": [model.model],
        "llm": [llm],
        "layer": list(llm.layers),
        "tower": [model.model.vision_tower],
    }
    for module in modules[role]:
        rename(module, old, f"new_{old}")
    return model


@pytest.mark.parametrize(("role", "argument", "old"), PLACES)
def test_an_unknown_name_is_refused_when_attaching(role: str, argument: str, old: str) -> None:
    model = renamed(role, old)
    with pytest.raises(UnsupportedError) as refused:
        tokenprune.attach(model, INSIDE)
    words = str(refused.value)
    known = library("transformers")
    assert f"does not take {getattr(Call, argument)}" in words
    assert f"found transformers {known.found}, tested {known.oldest} to {known.newest}" in words


@pytest.mark.parametrize(("role", "argument", "old"), PLACES[:-1])
def test_one_word_in_the_wall_serves_it(
    role: str, argument: str, old: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny_llava()
    with torch.no_grad():
        with tokenprune.attach(plain, INSIDE, spec(8)):
            wanted = generate(plain, collate(prompts()))
        alone = oracle.greedy_batch(plain, prompts(), 4)[1]
    known = getattr(Call, argument)
    monkeypatch.setattr(known, "names", (f"new_{old}", *known.names))
    model = renamed(role, old)
    with tokenprune.attach(model, INSIDE, spec(8)):
        assert torch.equal(generate(model, collate(prompts())).logits, wanted.logits)
    with tokenprune.attach(model, spec(4)):
        got = generate(model, collate(prompts())).logits
    torch.testing.assert_close(got, alone, rtol=0, atol=2e-5)
