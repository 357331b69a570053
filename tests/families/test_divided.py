"""Budgets for crops and frames: the plain model under masks, row by row of what is divided."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune
from support.families import FAMILIES, SPECIAL, Tiny, case_of
from tokenprune.spec import parse
from tokenprune_adapters.hf.checks import VERSION
from tokenprune_adapters.hf.trials.oracle import Cut, Oracle

NAMED = {tiny.name: tiny for tiny in FAMILIES}
FRAMES = {"qwen2-vl": 2, "qwen2.5-vl": 2, "qwen3-vl": 2, "qwen3-vl-moe": 2}
VIDEOS = [*FRAMES, "llava-onevision", "llava-next-video", "video-llava"]
CROPS = ["llava-next", "llava-onevision", "llava-next-video"]
STEPS = 3
BEAMS = 1 if VERSION < (5, 23) else 2  # older releases encode the videos of each beam of Qwen


def present(names: list[str]) -> list[str]:
    """Those that the transformers that is installed has as described."""
    return [name for name in names if name in NAMED]


def divided(tiny: Tiny, inputs: Any, kinds: str) -> tuple[list[Tensor], list[Tensor]]:
    """`(2, slots)` prompt and column of each crop or frame, and the patches in it.

    A slot without a patch is of the frame before it, and of no crop.
    """
    case = case_of(tiny)
    parts = case.anatomy(case.build("sdpa"))
    patches = case.patches or [torch.arange(slots) for _, slots in case.rows]
    at = {
        kind: parts.placeholders(inputs["input_ids"], kind)
        .nonzero()
        .T.split([slots for of, slots in case.rows if of == kind], dim=1)
        for kind in {kind for kind, _ in case.rows}
    }
    left = {kind: iter(each) for kind, each in at.items()}
    rows, held = [], []
    for (kind, _), patch in zip(case.rows, patches, strict=True):
        row, whole = next(left[kind]), int((patch >= 0).sum())
        size = 16 if kind == "image" else whole // FRAMES.get(tiny.name, 3)
        if kind not in kinds:
            size = int(patch.max()) + 1
        part = torch.where(patch >= 0, patch // size, -1)
        if kind == "video":
            part = part.cummax(0).values.clamp(min=0)
        for number in range(int(part.max()) + 1):
            rows.append(row[:, part == number])
            held.append(torch.where(patch >= 0, patch % size, -1)[part == number])
    return rows, held


def compare(tiny: Tiny, spec: str, layer: int, kinds: str) -> None:
    case = case_of(tiny)
    inputs = case.inputs((0, 1))
    cuts = (Cut(layer, parse("uniform | evict(3)").strategy),)
    plain = case.build("eager")
    oracle = Oracle(plain, case.anatomy(plain).llm, *divided(tiny, inputs, kinds), cuts, SPECIAL)
    wanted = oracle.expected(inputs, STEPS)
    for attention in ("sdpa", "eager"):
        model = case.build(attention)
        with torch.no_grad(), tokenprune.attach(model, spec):
            got = model(**inputs).logits
            text = case.generate(model, inputs, STEPS)
            beams = case.generate(model, inputs, STEPS, num_beams=2, use_cache=False)
            torch.testing.assert_close(
                got[wanted.left], wanted.logits[wanted.left], rtol=0, atol=5e-5
            )
            assert torch.equal(text, wanted.text)
            assert torch.equal(beams, case.generate(model, inputs, STEPS, num_beams=2))


@pytest.mark.parametrize("where", ["before-llm(positions='original')", "after-layer(2)"])
@pytest.mark.parametrize("name", present(VIDEOS))
def test_every_frame_has_a_budget(name: str, where: str) -> None:
    layer = 2 if "after" in where else 0
    compare(NAMED[name], f"uniform | evict(3, per='frame') @ {where}", layer, "video")


@pytest.mark.parametrize("name", present(CROPS))
def test_every_crop_has_a_budget(name: str) -> None:
    spec = "uniform | evict(3, per='crop') @ before-llm(positions='original')"
    compare(NAMED[name], spec, 0, "image video")


@pytest.mark.parametrize("name", present(VIDEOS))
def test_frames_are_told_after_generating(name: str) -> None:
    """`generate` hands on what it encoded without the pixels, by which frames are counted."""
    case = case_of(NAMED[name])
    model, inputs = case.build("sdpa"), case.inputs((1,))
    for spec in ("random | evict(1.0)", "random | evict(3, per='frame')"):
        kept = []
        for where in ("before-llm", "after-layer(2)"):
            with tokenprune.attach(model, f"{spec} @ {where}") as attachment:
                case.generate(model, inputs, 2, num_beams=BEAMS)
            kept += attachment.report.kept
        before, after = kept
        assert before == after
        assert set(before.crop) == set(range(FRAMES.get(name, 3)))


@pytest.mark.parametrize("name", present(CROPS))
@torch.no_grad()
def test_newlines_may_be_dropped(name: str) -> None:
    """As if a mask hid them from the plain model."""
    tiny = NAMED[name]
    case = case_of(tiny)
    model, inputs = case.build("sdpa"), dict(case.inputs((0,)))
    spec = "uniform | evict(1.0) @ before-llm(positions='original', newline='drop')"
    with tokenprune.attach(model, spec):
        out = model(**inputs, use_cache=True)
    slots = inputs["input_ids"].shape[1]
    ids = case.anatomy(model).placeholders(inputs["input_ids"], "image")
    assert case.patches is not None
    newline = torch.cat(list(case.patches[:2])) < 0
    inputs["attention_mask"] = inputs["attention_mask"].masked_scatter(ids, (~newline).long())
    inputs["position_ids"] = torch.arange(slots)[None]
    torch.testing.assert_close(
        out.logits[:, -2:], model(**inputs).logits[:, -2:], rtol=0, atol=5e-5
    )
    cache = out["cache" if "cache" in out else "past_key_values"]
    assert cache.layers[0].keys.shape[2] == slots - int(newline.sum())
