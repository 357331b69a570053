"""What an engine is asked to do: counts known in advance, and refusals in words. Without vLLM."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tokenprune import (
    AttachError,
    BudgetError,
    Evict,
    Keep,
    Plan,
    Reducer,
    Signals,
    SpecError,
    Strategy,
    UniformScorer,
    UnknownNameError,
    UnsupportedError,
    VisualTokens,
    parse,
)
from tokenprune.signals import ClsAttention, JointClsAttention, Keys
from tokenprune_adapters import vllm
from tokenprune_adapters.vllm.settings import ARCHITECTURE, KEY, Served, check_engine

TOKENS = 64


def config(prune: object = "cls-attention | evict(14)", **changes: Any) -> SimpleNamespace:
    """The config of a LLaVA-1.5 whose tower has 6 layers, the features from the fifth."""
    vision = {
        "model_type": "clip_vision_model",
        "image_size": 64,
        "patch_size": 8,
        "num_hidden_layers": 6,
    }
    vision.update(changes.pop("vision", {}))
    fields = {
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        KEY: {"prune": prune},
    }
    return SimpleNamespace(**{**fields, **changes}, vision_config=SimpleNamespace(**vision))


def seen(batch: int, tokens: int = TOKENS) -> tuple[VisualTokens, Signals]:
    """Random tokens and what all built-in strategies read of a tower."""
    made = torch.Generator().manual_seed(batch)
    features = torch.randn(batch, tokens, 8, generator=made)
    signals = {
        signal: torch.rand(batch, layers, 4, tokens, generator=made)
        for signal, layers in ((ClsAttention(3), 3), (ClsAttention((-2,)), 1))
    }
    joint = torch.rand(batch, 1, tokens, generator=made)
    keys = torch.randn(batch, 4, tokens, 4, generator=made)
    return (
        VisualTokens.of(features, ids=torch.arange(batch)),
        Signals({**signals, JointClsAttention((-2,)): joint, Keys(-2): keys}),
    )


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        ("cls-attention | evict(14)", 14),
        ("vtc-cls(keep=7)", 7),
        ("random | evict(0.25)", 16),
        ("uniform | evict(0.01)", 1),
        ("uniform | evict(1.0)", 64),
        ("uniform | evict(1000)", 64),
        ("tome(9)", 9),
        ("kmeans(5)", 5),
        ("pool(16)", 16),
        ("diverse(0.098)", 6),
        ("prumerge(keep=8, layer=-2)", 8),
        ("cls-attention | evict(0.5) | tome(0.25)", 8),
        ("uniform | evict(12) | cls-attention | evict(0.5)", 6),
        ("cls-attention | dominant-contextual(10, contextual=0.2, layer=-2)", 10),
    ],
)
def test_the_count_is_known_and_kept(spec: str, count: int) -> None:
    served = Served.of(config(spec))
    assert served.count() == count
    left = served.reduce(*seen(2), [count, count])
    assert [tuple(each.shape) for each in left] == [(count, 8)] * 2
    expected = parse(spec).strategy(*seen(2)).tokens.features
    assert torch.equal(torch.stack(left), expected)


@given(
    keep=st.one_of(st.integers(1, 100), st.floats(0, 1, exclude_min=True)),
    side=st.integers(1, 12),
)
def test_the_count_is_that_of_the_core(keep: float, side: int) -> None:
    served = Served.of(config(f"uniform | evict({keep!r})", vision={"image_size": 8 * side}))
    assert served.tokens == side * side
    assert served.count() == Keep(keep).count(side * side)
    (left,) = served.reduce(*seen(1, side * side), [served.count()])
    assert len(left) == served.count()


@pytest.mark.parametrize(
    ("keep", "count"), [(3, 3), (0.5, 32), (1, 1), (1.0, 64), (14, 14), (64, 64), (999, 64)]
)
def test_a_request_may_say_another_budget(keep: float, count: int) -> None:
    served = Served.of(config())
    assert served.count({"keep": keep}) == count
    (left,) = served.reduce(*seen(1), [count])
    expected = parse(f"cls-attention | evict({keep!r})").strategy(*seen(1)).tokens.features[0]
    assert torch.equal(left, expected)


def test_budgets_of_one_batch_may_differ() -> None:
    served = Served.of(config("random | evict(14)"))  # its scores depend on which picture it is
    counts = [7, 14, 7, 64, 1]
    left = served.reduce(*seen(5), counts)
    assert [len(each) for each in left] == counts
    for row, count in enumerate(counts):
        alone = parse(f"random | evict({count})").strategy(*seen(5))
        assert torch.equal(left[row], alone.tokens.features[row])


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"keep": 0}, "keep=0 leaves no visual token"),
        ({"keep": -1}, "must be >= 0"),
        ({"keep": 0.0}, r"must be in \(0, 1\]"),
        ({"keep": 1.5}, r"must be in \(0, 1\]"),
        ({"keep": True}, "must be an int .count. or a float"),
        ({"keep": "14"}, "must be an int .count. or a float"),
        ({"keep": None}, "must be an int .count. or a float"),
        ({}, "must be {'keep': count or fraction}"),
        ({"keep": 3, "per": "crop"}, "must be {'keep': count or fraction}"),
        ({"prune": "uniform | evict(3)"}, "which scorer ranks the tokens is the engine's to say"),
        (14, "must be {'keep': count or fraction}, got 14"),
    ],
)
def test_budgets_of_requests_are_checked(request_: object, words: str) -> None:
    with pytest.raises(BudgetError, match=words):
        Served.of(config()).count(request_)


def test_a_request_cannot_choose_among_several_budgets() -> None:
    served = Served.of(config("cls-attention | evict(0.5) | tome(0.25)"))
    with pytest.raises(UnsupportedError, match="has 2 budgets, so a request cannot set one"):
        served.count({"keep": 4})
    assert served.count({"keep": served.count()}) == 8


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("cls-attention | evict(7) @ after-layer(2)", "acts inside the LLM. vLLM gives every"),
        ("fastv", "acts inside the LLM"),
        ("pyramiddrop", "acts inside the LLM"),
        ("fastv | evict(7) @ before-llm", "cannot supply LastQueryAttention"),
        ("relevance | evict(7)", "cannot supply AlignedFeatures, TextFeatures"),
        ("relevance | evict(7)", "Scorers that work here: cls-attention, .*random"),
        ("pool-attention | evict(7)", "cannot supply PoolAttention"),
        ("prumerge(keep=None, layer=-2)", "depends on the picture, but vLLM reserves room"),
        ("prumerge(keep=8)", "reads layer 5, but vLLM's tower ends at layer 4"),
        ("cls-attention(layers=(-1,)) | evict(7)", "ask for layers up to -2"),
        ("uniform | evict(7) @ before-llm(positions='original')", "counts the tokens of a prompt"),
        ("uniform | evict(7); uniform | evict(3)", "2 stages before the LLM; join them"),
        ("uniform | evict(0.5, per='frame')", "no frames"),
    ],
)
def test_what_vllm_cannot_do_is_refused(spec: str, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        Served.of(config(spec))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision": {"model_type": "siglip_vision_model"}}, "the vision tower is a siglip_vision"),
        ({"vision": {"model_type": "pixtral"}}, "reads CLIP towers alone"),
        ({"vision_feature_select_strategy": "full"}, "only 'default' is supported"),
        ({"vision_feature_layer": [-2, -5]}, "takes features of one layer"),
        ({"vision_feature_layer": 0}, "reads the embeddings"),
    ],
)
def test_models_that_cannot_be_read_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        Served.of(config(**changes))


def test_layers_are_those_of_the_checkpoint() -> None:
    early = {"vision_feature_layer": 3}  # the output of the third block
    Served.of(config("cls-attention(layers=3) | evict(7)", **early))
    with pytest.raises(UnsupportedError, match="reads layer 3, but vLLM's tower ends at layer 2"):
        Served.of(config("cls-attention(layers=(-3,)) | evict(7)", **early))


@pytest.mark.parametrize("settings", [None, {}, "evict(3)", {"prune": 3}, {"prun": "random"}])
def test_settings_are_asked_for(settings: object) -> None:
    with pytest.raises(SpecError, match="hf_overrides must say what to do, as {'tokenprune'"):
        Served.of(config(**{KEY: settings}))


def test_specs_are_refused_as_everywhere() -> None:
    with pytest.raises(UnknownNameError, match="unknown strategy 'nope'"):
        Served.of(config("nope | evict(3)"))
    with pytest.raises(BudgetError, match="keep=0 leaves no visual token"):
        Served.of(config("uniform | evict(0)"))


def test_options_that_contradict_are_refused() -> None:
    served = Served.of(config())
    check_engine(served, embeds=False, processor_kwargs={"size": 3})
    with pytest.raises(UnsupportedError, match="passed no vision tower here"):
        check_engine(served, embeds=True, processor_kwargs={})
    with pytest.raises(UnsupportedError, match="stands in hf_overrides"):
        check_engine(served, embeds=False, processor_kwargs={KEY: {"keep": 3}})


@dataclass(frozen=True)
class OneLess(Reducer):
    """A third party's reducer that does not keep what it promises."""

    keep: int

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        batch, count = tokens.mask.shape
        return Plan.of_indices(torch.arange(self.keep - 1).expand(batch, -1), count)


def test_a_reducer_that_breaks_its_promise_is_found() -> None:
    served = Served(Strategy(OneLess(5)), TOKENS)
    assert served.count() == 5
    with pytest.raises(AttachError, match=r"left \(4,\) tokens where its budget says 5"):
        served.reduce(*seen(1), [5])


def test_the_strategy_is_not_changed_by_requests() -> None:
    served = Served(Strategy(UniformScorer(), Evict(14)), TOKENS)
    assert served.keeping(14) is served.strategy
    assert served.keeping(3) == Strategy(UniformScorer(), Evict(3))
    assert served.strategy == Strategy(UniformScorer(), Evict(14))


def test_vllm_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, str] = {}
    fake: Any = ModuleType("vllm")
    fake.ModelRegistry = SimpleNamespace(
        get_supported_archs=lambda: known.keys(),
        register_model=lambda name, where: known.update({name: where}),
    )
    monkeypatch.setitem(sys.modules, "vllm", fake)
    (entry,) = [
        each
        for each in importlib.metadata.entry_points(group="vllm.general_plugins")
        if each.name == "tokenprune"
    ]
    register = entry.load()
    assert register is vllm.register
    register()
    known[ARCHITECTURE] += " "
    register()
    module, name = known[ARCHITECTURE].strip().split(":")
    assert (module, name) == ("tokenprune_adapters.vllm.llava", ARCHITECTURE)
    assert known[ARCHITECTURE].endswith(" ")  # a second call changed nothing


def test_the_plugin_is_light() -> None:
    """Every process that vLLM starts imports it."""
    code = (
        "import sys, tokenprune_adapters.vllm;"
        "print([m for m in ('vllm', 'transformers', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
