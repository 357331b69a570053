from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

import tokenprune as library
from tokenprune.cli import timing
from tokenprune.cli.console import milliseconds, size
from tokenprune_adapters import pocket


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Seconds for 1 and for 16 tokens: a slow warm-up, then three rounds of two specs."""
    scripted = iter([90, 99, 90, 99, 1, 16, 2, 32, 3, 33, 2, 17, 5, 20, 7, 82])
    monkeypatch.setattr(timing, "_seconds", lambda *_: next(scripted))
    yield
    assert not list(scripted)


@pytest.mark.usefixtures("clock")
def test_medians_of_the_rounds_after_the_warm_up() -> None:
    model, _ = pocket.load()
    vanilla, pruned = timing.measure(model, {}, [None, "random | evict(3)"], runs=3)
    assert (vanilla.first, pruned.first) == (3, 2)
    assert (vanilla.each, pruned.each) == (1, 2)
    library.attach(model, "random | evict(3)").detach()  # nothing was left behind


def test_all_tokens_are_generated_whatever_the_model_says() -> None:
    model, processor = pocket.load()
    scene = pocket.draw(1)
    text = pocket.prompt(pocket.questions(scene)[0])
    inputs = processor(images=scene.picture, text=text, return_tensors="pt")
    calls = []
    handle = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    timing.measure(model, inputs, [None], runs=1)
    handle.remove()
    assert len(calls) == 2 * (1 + timing.STEPS)


@pytest.mark.parametrize(("device", "waits"), [("cuda:1", 2), ("cpu", 0)])
def test_the_clock_waits_for_the_device_of_the_model(
    monkeypatch: pytest.MonkeyPatch, device: str, waits: int
) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *given: waited.extend(given))
    model = SimpleNamespace(device=torch.device(device), generate=lambda **_: None)
    timing._seconds(model, {}, 1)
    assert waited == [torch.device(device)] * waits


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.25, "250 ms"), (0.01234, "12.3 ms"), (0.000123, "0.123 ms")]
)
def test_milliseconds(seconds: float, words: str) -> None:
    assert milliseconds(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"), [(5, "5 B"), (2048, "2.0 KiB"), (3 << 20, "3.0 MiB"), (5 << 30, "5.0 GiB")]
)
def test_size(count: int, words: str) -> None:
    assert size(count) == words
