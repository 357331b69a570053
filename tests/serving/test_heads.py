"""What is read from vLLM's tower, and that all tensor-parallel processes read the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tokenprune
from support import two_ranks
from support.sharded_clip import ShardedClip, pictures, tower
from tokenprune import ClsAttention, Keys, ReceivedAttention, parse
from tokenprune_adapters.vllm.heads import gather_heads
from tokenprune_adapters.vllm.tower import ClipTaps

SPECS = [
    "cls-attention(layers=3) | evict(6)",
    "cls-attention(layers=(-2, 0), ensemble='max') | evict(6)",
    "prumerge(6, layer=-2)",
    "received-attention(layers=2) | dominant-contextual(6, contextual=0.5, layer=-2)",
]


def never(x: torch.Tensor, axis: int) -> torch.Tensor:
    raise AssertionError("one process alone has nothing to gather")


@pytest.mark.parametrize("spec", SPECS)
def test_signals_are_those_of_transformers(spec: str) -> None:
    signals = parse(spec).strategy.signals
    model = tower()
    with torch.no_grad(), tokenprune.observe(model, signals, feature_layer=-2) as seen:
        model(pictures())
    ((tokens, found),) = two_ranks.read([spec], 0, 1, never)
    assert torch.equal(tokens.ids, seen.tokens.ids)
    torch.testing.assert_close(tokens.features, seen.tokens.features, atol=1e-4, rtol=1e-4)
    assert set(found) == set(signals)
    for signal in signals:
        torch.testing.assert_close(found[signal], seen.signals[signal], atol=1e-4, rtol=1e-4)


def test_two_processes_keep_the_same_tokens_as_one(tmp_path: Path) -> None:
    expected = [
        parse(spec).strategy(*seen)
        for spec, seen in zip(SPECS, two_ranks.read(SPECS, 0, 1, never), strict=True)
    ]
    first, second = two_ranks.run(tmp_path, SPECS)
    for number, reduction in enumerate(expected):
        assert torch.equal(first["whole"][number], reduction.plan.anchors)
        assert torch.equal(second["whole"][number], reduction.plan.anchors)
        signals, others = first["signals"][number], second["signals"][number]
        assert all(
            torch.equal(signals[s], others[s]) for s in parse(SPECS[number]).strategy.signals
        )
    # Each by its own heads, they would have disagreed: the test can fail.
    assert not torch.equal(first["alone"][0], second["alone"][0])


def test_heads_come_in_the_order_of_ranks_and_collectives_in_one_order() -> None:
    asked: list[tuple[int, int]] = []

    def gather(x: torch.Tensor, axis: int) -> torch.Tensor:
        asked.append((x.ndim, axis))
        return torch.cat([x, x + 1], axis)

    found = {
        Keys(-2): torch.zeros(2, 3, 5, 4),
        ReceivedAttention(1): torch.zeros(2, 1, 3, 5),
        ClsAttention(2): torch.zeros(2, 2, 3, 5),
    }
    whole = gather_heads(found, gather)
    assert {s: tuple(x.shape) for s, x in whole.items()} == {
        ClsAttention(2): (2, 2, 6, 5),
        Keys(-2): (2, 6, 5, 4),
        ReceivedAttention(1): (2, 1, 6, 5),
    }
    assert whole[Keys(-2)][0, :, 0, 0].tolist() == [0, 0, 0, 1, 1, 1]
    first = list(asked)
    gather_heads(dict(reversed(found.items())), gather)
    assert asked == first * 2


def test_nothing_is_left_after_a_pass() -> None:
    model = ShardedClip(tower(), run=3)
    taps = ClipTaps(model, parse(SPECS[0]).strategy.signals, -2, never)
    with torch.no_grad():
        model(pictures())
    taps.observation.take()
    assert not taps.observation.ready
    assert not taps.observation.running
