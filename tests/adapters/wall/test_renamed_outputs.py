"""A release that renames a field of an output: refused in words, never read as None."""

from __future__ import annotations

import functools
from dataclasses import fields, make_dataclass
from typing import Any

import pytest
import torch

import tokenprune
from support.llava import collate, generate, prompts, spec, tiny_llava
from support.outputs import cache_argument
from tokenprune import UnsupportedError
from tokenprune_adapters.hf.outputs import Field, Output

from .test_renamed import with_method

SHOWN = "image_outputs" if cache_argument() == "cache" else "image_hidden_states"
INSIDE = "uniform | evict(4) @ after-layer(1)"


def renamed(raw: Any, old: str) -> Any:
    """`raw` as an output whose class calls a field otherwise; its own model still reads the old."""
    names = [each.name for each in fields(raw)]
    cls: Any = make_dataclass(type(raw).__name__, [f"new_{n}" if n == old else n for n in names])
    setattr(cls, old, property(lambda self: getattr(self, f"new_{old}")))
    cls.__getitem__ = lambda self, key: getattr(self, key)
    return cls(*(getattr(raw, name) for name in names))


def renaming(role: str, old: str) -> Any:
    model: Any = tiny_llava()
    if role == "encoder":
        encode = model.model.get_image_features

        @functools.wraps(encode)
        def encode_renamed(*args: Any, **kwargs: Any) -> Any:
            return renamed(encode(*args, **kwargs), old)

        with_method(model.model, "get_image_features", encode_renamed)
    else:
        module = {"core": model.model, "llm": model.model.language_model}[role]
        module.register_forward_hook(lambda module, args, output: renamed(output, old))
    return model


@pytest.mark.parametrize(
    ("role", "old", "where"),
    [
        ("llm", "last_hidden_state", spec(4)),
        ("llm", cache_argument(), spec(4)),
        ("llm", cache_argument(), INSIDE),
        ("llm", cache_argument(), spec(64)),
        ("core", SHOWN, spec(4)),
        pytest.param(
            *("encoder", "pooler_output", spec(4)),
            marks=pytest.mark.skipif(SHOWN != "image_outputs", reason="callers are shown features"),
        ),
        ("encoder", "pooler_output", INSIDE),
    ],
)
def test_a_field_of_another_name_is_refused(role: str, old: str, where: str) -> None:
    model = renaming(role, old)
    with (
        tokenprune.attach(model, where),
        pytest.raises(UnsupportedError, match=rf"has no \w+.*; it has .*new_{old}"),
    ):
        generate(model, collate(prompts()))


@torch.no_grad()
def test_what_is_watched_without_its_cache_is_refused() -> None:
    model = renaming("core", cache_argument())
    with (
        tokenprune.watch(model),
        pytest.raises(UnsupportedError, match="has no cache .before: past_key_values"),
    ):
        model(**collate(prompts()))


def test_a_field_that_is_there_may_hold_none() -> None:
    cls = make_dataclass("Made", ["last_hidden_state", "hidden_states"])
    output = Output(cls(torch.zeros(1), None))
    assert output.states is None
    with pytest.raises(UnsupportedError, match=r"Made has no cache \(before: past_key_values\)"):
        _ = output.cache
    with pytest.raises(UnsupportedError, match="Made has no pooler_output; it has last_hidden"):
        output.replaced(features=1)
    with pytest.raises(UnsupportedError, match="Made has no image_outputs"):
        output.show(lambda features: features)
    assert Field("new", "old").name_in(cls(1, 2)) is None
