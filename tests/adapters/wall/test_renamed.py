"""A release that renames an argument: refused in words, and served once the wall knows the name."""

from __future__ import annotations

import functools
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
    ("positions", "position_ids"),
]
CORE = [
    ("ids", "input_ids"),
    ("mask", "attention_mask"),
    ("encoded", "mm_encoder_outputs"),
    ("pixels", "pixel_values"),
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


def with_method(core: Any, name: str, method: Any) -> None:
    """Let `core` be of a class with another method; its own is replaced by nobody."""
    core.__class__ = type(type(core).__name__, (type(core),), {name: staticmethod(method)})


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


@pytest.mark.parametrize("name", ["cache", "encoded", "kept_logits"])
def test_what_tells_where_a_prompt_ends_is_looked_for(name: str) -> None:
    """Where it is absent nothing is wrong with a call, so it must be told when attaching."""
    model: Any = tiny_llava()
    argument = getattr(Call, name)
    taken = inspect.signature(type(model).forward).parameters
    (old,) = set(argument.names) & set(taken)
    rename(model, old, f"new_{old}")
    for attached in (
        lambda: tokenprune.attach(model, "fastv | evict(4) @ after-layer(2)"),
        lambda: tokenprune.watch(model).__enter__(),
    ):
        with pytest.raises(UnsupportedError) as refused:
            attached()
        assert f"{type(model).__name__} does not take {argument}" in str(refused.value)
    tokenprune.attach(model, INSIDE).detach()


def test_names_of_attention_functions_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scale: float) -> None:
        """With other names than today's."""

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", attention)
    model = tiny_llava()
    words = "functions do not take attention_mask, scaling; rank by cls-attention"
    with pytest.raises(UnsupportedError, match=words):
        tokenprune.attach(model, "fastv | evict(4) @ after-layer(2)")
    with pytest.raises(UnsupportedError, match=words), tokenprune.watch(model):
        pass
    tokenprune.attach(model, "cls-attention | evict(4) @ after-layer(2)").detach()


@torch.no_grad()
def test_a_wrapped_part_is_refused_before_and_served_after_attaching() -> None:
    model: Any = tiny_llava()
    core, plain, inputs = model.model, model.model.language_model, collate(prompts())
    with tokenprune.attach(model, INSIDE):
        wanted = model(**inputs).logits
    core.language_model = torch.compile(plain, backend="eager")
    with pytest.raises(UnsupportedError, match=r"OptimizedModule wraps .*; attach first and wrap"):
        tokenprune.attach(model, INSIDE)
    core.language_model = plain
    with tokenprune.attach(model, INSIDE):
        core.language_model = torch.compile(plain, backend="eager")
        torch.testing.assert_close(model(**inputs).logits, wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_partial_functions_are_known_by_what_they_take() -> None:
    model: Any = tiny_llava()
    core = model.model
    with_method(core, "get_image_features", functools.partial(core.get_image_features))
    core.language_model.forward = functools.partial(core.language_model.forward)
    with tokenprune.attach(model, spec(4)) as attached:
        model(**collate(prompts()))
    assert attached.last.plan.lengths == (4, 4, 4)


def test_other_feature_layers_are_looked_for_where_encoders_take_them() -> None:
    model: Any = tiny_llava()
    encode = model.model.get_image_features

    def renamed(pixel_values: Any, layer: Any = None, **rest: Any) -> Any:
        return encode(pixel_values, vision_feature_layer=layer, **rest)

    with_method(model.model, "get_image_features", renamed)
    with pytest.raises(UnsupportedError, match="renamed does not take vision_feature_layer"):
        tokenprune.attach(model, spec(4))


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
