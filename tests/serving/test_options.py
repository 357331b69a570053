"""Names in `mm_processor_kwargs` and `hf_overrides` that nobody reads are refused. Without vLLM."""

from __future__ import annotations

import pytest
import torch

from tokenprune import BudgetError, UnsupportedError
from tokenprune_adapters import pocket
from tokenprune_adapters.vllm.request_options import (
    EngineError,
    OptionError,
    Options,
    check_overrides,
    check_pixels,
    no_value_errors,
)


@pytest.fixture(scope="module")
def options() -> Options:
    """Those of LLaVA's processor."""
    return Options.of(pocket.load()[1])


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"tokenprune": {"keep": 3}},
        {"tokenprune": "its values are checked where they are read"},
        {"do_resize": True, "size": {"shortest_edge": 64}, "image_mean": [0.5, 0.5, 0.5]},
        {"images_kwargs": {"do_resize": True, "crop_size": 64}},
        {"text_kwargs": {"truncation": False}, "truncation": False},
        {"videos_kwargs": {"fps": 2}, "use_audio_in_video": False},
        {"patch_size": 8, "vision_feature_select_strategy": "default", "image_token": "<image>"},
    ],
)
def test_what_processors_and_vllm_define_is_let_through(
    options: Options, given: dict[str, object]
) -> None:
    options.check(given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tokenprun": {"keep": 3}}, "has 'tokenprun', which nobody reads (did you mean 'token"),
        ({"TokenPrune": {"keep": 3}}, "(did you mean 'tokenprune'?)"),
        ({"token_prune": {"keep": 3}}, "(did you mean 'tokenprune'?)"),
        ({"keep": 3}, "written {'tokenprune': {'keep': count or fraction}}"),
        ({"tokenprune": {"keep": 3}, "keep": 3}, "mm_processor_kwargs has 'keep', which nobody"),
        ({"prune": "evict(3)", "budget": 3}, "has 'budget', 'prune', which nobody reads;"),
        ({"do_resise": False}, "(did you mean 'do_resize'?)"),
        ({"tokenizer": "other"}, "has 'tokenizer', which nobody reads"),
        (
            {"images_kwargs": {"tokenprune": {"keep": 3}}},
            "kwargs['images_kwargs'] has 'tok",
        ),
        ({"images_kwargs": {"crop_sise": 3}}, "(did you mean 'crop_size'?)"),
        ({"text_kwargs": {"keep": 3}}, "mm_processor_kwargs['text_kwargs'] has 'keep'"),
        ({"images_kwargs": 3}, "mm_processor_kwargs['images_kwargs'] must be a mapping, got 3"),
        ({"tokenprune": None}, "is null; leave it out for the engine's own budget"),
    ],
)
def test_what_nobody_reads_is_refused(
    options: Options, given: dict[str, object], words: str
) -> None:
    with pytest.raises(OptionError) as caught:
        options.check(given)
    assert words in str(caught.value)
    assert isinstance(caught.value, ValueError)  # which vLLM answers with status 400


@pytest.mark.parametrize(
    "name", ["tokenprun", "tokenprunes", "token_prune", "Tokenprune", "prune", "keep"]
)
def test_overrides_that_look_like_ours(name: str) -> None:
    ours = {"architectures": ["X"], "tokenprune": {"prune": "uniform | evict(3)"}}
    check_overrides(ours | {"vision_feature_layer": -3, "text_config": {"vocab_size": 3}})
    check_overrides(lambda config: config)
    with pytest.raises(OptionError, match=f"hf_overrides has '{name}', which nobody reads"):
        check_overrides(ours | {name: 3})


def test_no_value_error_leaves_the_start_of_an_engine() -> None:
    """vLLM would take one for a model without pictures, and serve text alone."""
    with pytest.raises(EngineError, match="keep=0 leaves no") as caught, no_value_errors():
        raise BudgetError("keep=0 leaves no visual token")
    assert not isinstance(caught.value, ValueError)
    with pytest.raises(UnsupportedError), no_value_errors():
        raise UnsupportedError("acts inside the LLM")


def test_pictures_of_another_size_than_the_towers() -> None:
    check_pixels(torch.zeros(2, 3, 64, 64), 64)
    with pytest.raises(OptionError, match="make pictures of 32x64 pixels, but the vision tower"):
        check_pixels([torch.zeros(3, 64, 64), torch.zeros(3, 32, 64)], 64)
