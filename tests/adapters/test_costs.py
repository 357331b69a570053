"""What attaching costs, where it can be counted: host syncs, graphs, fingerprints.

Syncs are counted on a CPU, as calls that a GPU would have to wait for. What a plan checks on a CPU
alone is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import tokenprune
import tokenprune_adapters.kit.fingerprint as prints
from support.llava import collate, prompts, tiny_llava
from support.syncs import Syncs
from tokenprune.versions import library

BEFORE = "cls-attention(layers=1) | evict(9)"
AFTER = "fastv | evict(4) @ after-layer(1)"
SPECS = [BEFORE, AFTER, f"{BEFORE}; {AFTER}", "tome(5) @ after-layer(1)"]


def counted(found: list[str]) -> list[str]:
    on_cpu_alone = ("tokenprune/plan.py", "tokenprune/memberships.py")
    return [each for each in found if not any(name in each for name in on_cpu_alone)]


def step(model: Any, out: Any, mask: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """The next token of every prompt, and the mask that it was made with."""
    newest = out.logits[:, -1:].argmax(-1)
    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    cache = out.past_key_values
    return model(input_ids=newest, attention_mask=mask, past_key_values=cache, use_cache=True), mask


@torch.no_grad()
def syncs(model: Any, spec: str | None) -> tuple[list[str], list[str]]:
    """Those of a prefill and of a decode step."""
    inputs = collate(prompts()[:2])
    with tokenprune.attach(model, spec) if spec else nullcontext():
        with Syncs() as prefill:
            out = model(**inputs, use_cache=True)
        with Syncs() as decode:
            step(model, out, inputs["attention_mask"])
    return counted(prefill.found), counted(decode.found)


@pytest.mark.parametrize(("spec", "more"), [(BEFORE, 1), (AFTER, 2), ("random | evict(9)", 1)])
def test_a_prefill_waits_little_more_than_the_model_and_a_decode_step_no_more(
    spec: str, more: int
) -> None:
    model = tiny_llava(layers=(2, 3))
    plain, attached = syncs(model, None), syncs(model, spec)
    assert len(attached[0]) <= len(plain[0]) + more, attached[0]
    assert len(attached[1]) <= len(plain[1]), attached[1]


def test_more_pictures_are_no_more_syncs() -> None:
    model = tiny_llava(layers=(2, 3))
    found = []
    for batch in (prompts()[:1], prompts()):
        with tokenprune.attach(model, BEFORE), torch.no_grad(), Syncs() as seen:
            model(**collate(batch))
        found.append(len(counted(seen.found)))
    assert found[0] == found[1]


def test_the_count_sees_what_waits() -> None:
    """A meta-test."""
    x = torch.arange(4.0)
    with Syncs() as seen:
        assert x.sum() > 0
        x[x > 2]
        x.tolist()
        x.nonzero()
        x + 1
    assert len(seen.found) == 4


@pytest.fixture
def _compiles() -> Iterator[None]:
    torch.compiler.reset()
    if torch.__version__.startswith(f"{library('torch').oldest}."):
        pytest.skip("this torch cannot compile a model of transformers as a whole")
    yield
    torch.compiler.reset()


@torch.no_grad()
def graphs(spec: str | None, tokens: int, **options: Any) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Graphs of compiled decode steps, and the tokens that they and uncompiled ones give."""
    model, inputs = tiny_llava(layers=(2, 3)), collate(prompts()[:2])
    said = []
    with tokenprune.attach(model, spec) if spec else nullcontext():
        for compiled in (False, True):
            run = torch.compile(model, **options) if compiled else model
            counters.clear()
            out, mask = model(**inputs, use_cache=True), inputs["attention_mask"]
            logits = []
            for _ in range(tokens):
                out, mask = step(run, out, mask)
                logits.append(out.logits[:, -1])
            said.append(torch.stack(logits))
    return counters["stats"]["unique_graphs"], said[0], said[1]


@pytest.mark.usefixtures("_compiles")
@pytest.mark.parametrize("spec", SPECS)
def test_decode_steps_are_one_graph_and_are_not_compiled_again(spec: str) -> None:
    """Over 16 tokens: as many graphs as of the plain model, the second without fixed lengths."""
    plain, _, _ = graphs(None, 16, backend="eager", fullgraph=True)
    torch.compiler.reset()
    attached, wanted, got = graphs(spec, 16, backend="eager", fullgraph=True)
    assert attached <= plain
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("_compiles")
@pytest.mark.parametrize(("spec", "more"), [(BEFORE, 4), (AFTER, 4)])
@torch.no_grad()
def test_a_compiled_prefill_breaks_at_four_places_more(spec: str, more: int) -> None:
    """Breaks by where they are: torch counts one again in every frame around it."""
    places = []
    for each in (None, spec):
        torch.compiler.reset()
        counters.clear()
        model, inputs = tiny_llava(layers=(2, 3)), collate(prompts()[:2])
        with tokenprune.attach(model, each) if each else nullcontext():
            torch.compile(model, backend="eager")(**inputs, use_cache=True)
        places.append(_places())
    ours = {place for place in places[1] if "untraced" in place}
    assert 0 < len(ours) <= more, ours
    assert len(places[1] - places[0] - ours) <= 2  # of transformers, behind a break of ours


def _places() -> set[str]:
    """Functions of ours that were left out, by name, and other reasons to break."""
    found = set()
    for reason in counters["graph_break"]:
        left = "torch.compiler.disable" in reason
        found.add(f"untraced {reason.split('function ')[-1][:60]}" if left else reason)
    return found


@pytest.mark.parametrize(
    ("spec", "reads"), [(BEFORE, False), ("uniform | evict(4)", False), ("random | evict(4)", True)]
)
def test_pixels_are_fingerprinted_where_somebody_asks(
    monkeypatch: pytest.MonkeyPatch, spec: str, reads: bool
) -> None:
    calls, real = [], prints.fingerprint
    monkeypatch.setattr(prints, "fingerprint", lambda pixels: (calls.append(1), real(pixels))[1])
    model = tiny_llava(layers=(2, 2))
    with tokenprune.attach(model, spec), torch.no_grad():
        model(**collate(prompts()))
    assert bool(calls) == reads


@torch.no_grad()
@pytest.mark.parametrize("spec", [BEFORE, AFTER])
def test_a_decode_step_leaves_the_states_of_the_cache_as_they_are(spec: str) -> None:
    """Of one prompt, which has neither padding nor fillers to go on with."""
    model, inputs = tiny_llava(layers=(2, 3)), collate(prompts()[:1])
    with tokenprune.attach(model, spec):
        out = model(**inputs, use_cache=True)
        states = [layer.state for layer in out.past_key_values.layers]
        out, _ = step(model, out, inputs["attention_mask"])
    later = [layer.state for layer in out.past_key_values.layers]
    assert all(one is other for one, other in zip(states, later, strict=True))
