"""The report of stages after layers: tokens per layer, KV bytes, calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokenprune
from support.llava import BOS, PATCHES, Row, collate, generate, prompts

LAYERS, KEY_HEADS, HEAD_CHANNELS = 3, 2, 8
WIDTH = max(len(row.ids) for row in prompts())


def kv_bytes(slots: list[int], rows: int = 3) -> int:
    """Keys and values, four bytes per number, of layers with so many slots."""
    return sum(2 * rows * count * KEY_HEADS * HEAD_CHANNELS * 4 for count in slots)


def widest(keep: int) -> int:
    return max(len(row.ids) - (PATCHES - keep) * len(row.images) for row in prompts())


def test_tokens_per_layer_and_bytes(llava: Any) -> None:
    model = llava()
    stages = ["cls-attention | evict(8) @ after-layer(1)", "fastv | evict(3) @ after-layer(2)"]
    with tokenprune.attach(model, *stages) as attachment:
        generate(model, collate(prompts()), steps=3)
        report = attachment.report
    assert [(image.before, image.after) for image in report.images] == [(PATCHES, 3)] * 3
    assert report.layers == ((0, 48), (1, 24), (2, 9))
    assert (report.calls, report.tokens_before, report.tokens_after) == (1, 48, 9)
    assert report.kv_bytes == kv_bytes([WIDTH, widest(8), widest(3)])
    assert report.kv_bytes_vanilla == kv_bytes([WIDTH] * LAYERS)
    assert report.selector_seconds > 0
    lines = str(report).splitlines()
    assert lines[0] == "visual tokens   16 -> 3, 16 -> 3, 16 -> 3"
    assert lines[2] == "by layer        48 from layer 0, 24 from layer 1, 9 from layer 2"


def test_with_a_stage_before_the_llm(llava: Any) -> None:
    """One batch is one call, however many places reduce it; beams are no pictures."""
    model = llava()
    stages = ["cls-attention | evict(10) @ before-llm", "fastv | evict(4) @ after-layer(1)"]
    with tokenprune.attach(model, *stages) as attachment:
        generate(model, collate(prompts()), steps=2)
        report = attachment.report
        assert [(image.before, image.after) for image in report.images] == [(PATCHES, 4)] * 3
        assert report.layers == ((0, 30), (1, 12))
        assert (report.calls, report.tokens_before, report.tokens_after) == (1, 48, 12)
        assert report.kv_bytes == kv_bytes([widest(10), widest(4), widest(4)])
        assert report.kv_bytes_vanilla == kv_bytes([WIDTH] * LAYERS)
        generate(model, collate(prompts()[:1]), steps=2, num_beams=2)
        report = attachment.report
    assert report.layers == ((0, 10), (1, 4))
    assert (report.calls, report.tokens_before, report.tokens_after) == (2, 48 + 16, 12 + 4)


@pytest.mark.parametrize("stage", ["fastv | evict(16) @ after-layer(1)", "uniform | evict(1.0)"])
def test_keeping_everything_counts_every_call(llava: Any, stage: str) -> None:
    with tokenprune.attach(llava(), stage) as attachment:
        for calls in (1, 2):
            generate(llava(), collate(prompts()), steps=1)
            report = attachment.report
            assert (report.calls, report.tokens_before) == (calls, 48 * calls)
            assert report.tokens_after == 48 * calls


def test_withdrawal(llava: Any) -> None:
    with tokenprune.attach(llava(), "vtw(layer=2)") as attachment:
        generate(llava(), collate(prompts()), steps=1)
        generate(llava(), collate([Row([BOS, 5, 6])]), steps=1)  # text only: not a call
    report = attachment.report
    assert report.layers == ((0, 48), (2, 0))
    assert [(image.before, image.after) for image in report.images] == [(PATCHES, 0)] * 3
    assert report.calls == 1


def test_without_a_cache_every_step_is_a_call(llava: Any) -> None:
    with tokenprune.attach(llava(), "fastv | evict(4) @ after-layer(1)") as attachment:
        generate(llava(), collate(prompts()), steps=3, use_cache=False)
    report = attachment.report
    assert (report.calls, report.tokens_after) == (3, 36)
    assert report.kv_bytes == report.kv_bytes_vanilla == 0


def test_the_latest_reduction_tells_where_tokens_went(llava: Any) -> None:
    model = llava()
    with tokenprune.attach(model, "fastv | evict(4) @ after-layer(1)") as attachment:
        generate(model, collate(prompts()), steps=1)
    last = attachment.last
    assert last.plan.lengths == (4, 4, 4)
    assert last.scores is not None
    best = last.scores.topk(4).indices.sort().values
    assert torch.equal(last.plan.anchors, best)
