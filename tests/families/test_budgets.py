"""Budgets of families: what a number of tokens is for."""

from __future__ import annotations

import pytest
import torch

import tokenprune
from support.families import FAMILIES, case_of
from tokenprune import UnsupportedError

NAMED = {tiny.name: tiny for tiny in FAMILIES}


@pytest.mark.parametrize("where", ["before-llm", "after-layer(2)"])
@pytest.mark.parametrize("name", ["internvl", "smolvlm", "idefics3"])
def test_tokens_of_a_picture_cannot_be_counted_where_tiles_are_handed_over(
    name: str, where: str
) -> None:
    model = NAMED[name].make("sdpa")
    with pytest.raises(UnsupportedError, match="tiles without saying.*per='crop', or keep as a fr"):
        tokenprune.attach(model, f"uniform | evict(5) @ {where}")
    tokenprune.attach(model, f"uniform | evict(5, per='crop') @ {where}").detach()
    tokenprune.attach(model, f"uniform | evict(0.5) @ {where}").detach()
    tokenprune.attach(model, "vtw(layer=3)").detach()  # none of a picture is none of a tile


VIDEOS = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "llava-onevision", "llava-next-video"]
VIDEOS = [name for name in VIDEOS if name in NAMED]


@pytest.mark.parametrize("name", VIDEOS)
def test_budgets_per_frame(name: str) -> None:
    """Each frame of a video keeps its number, and a picture is a frame of its own."""
    case = case_of(NAMED[name])
    model, inputs = case.build("sdpa"), case.inputs((0, 1))
    with torch.no_grad(), tokenprune.attach(model, "random | evict(3, per='frame')") as attachment:
        model(**inputs)
    frames = {"qwen2-vl": 2, "qwen2.5-vl": 2, "qwen3-vl": 2}.get(name, 3)
    pictures = [each for each in attachment.report.kept if each.kind == "image"]
    (video,) = [each for each in attachment.report.kept if each.kind == "video"]
    assert [len(each) for each in pictures] == [3, 3]
    assert [video.crop.count(frame) for frame in range(frames)] == [3] * frames
    patches = [video.of(frame) for frame in range(frames)]
    assert len(set(patches)) > 1  # frames draw random numbers of their own
    assert max(map(max, patches)) < (12 if frames == 3 else 16) // frames


@pytest.mark.parametrize("name", VIDEOS)
def test_a_budget_per_frame_is_the_same_for_scores_of_frames(name: str) -> None:
    """What is the same in every frame is kept alike over all of them."""
    case = case_of(NAMED[name])
    model, inputs = case.build("sdpa"), case.inputs((1,))
    kept = []
    for spec in ("uniform | evict(4, per='frame')", "uniform | evict(1.0)"):
        with torch.no_grad(), tokenprune.attach(model, spec) as attachment:
            model(**inputs)
        (video,) = attachment.report.kept
        kept.append(video)
    per_frame, whole = kept
    assert {len(per_frame.of(frame)) for frame in set(whole.crop)} == {4}
    assert {*zip(per_frame.crop, per_frame.patch, strict=True)} <= {
        *zip(whole.crop, whole.patch, strict=True)
    }


def test_budgets_that_cannot_be_are_refused() -> None:
    model = NAMED["qwen2-vl"].make("sdpa")
    mixed = ["uniform | evict(5, per='frame')", "uniform | evict(4) @ after-layer(2)"]
    with pytest.raises(UnsupportedError, match=r"all stages must share per, got \['frame', 'image"):
        tokenprune.attach(model, *mixed)
    with pytest.raises(UnsupportedError, match="hf-mistral3 has no frames"):
        tokenprune.attach(NAMED["mistral3"].make("sdpa"), "uniform | evict(5, per='frame')")
    with pytest.raises(UnsupportedError, match="crops are packed into one sequence"):
        tokenprune.attach(
            NAMED["llava-onevision"].make("sdpa"), "uniform | evict(5, per='crop') @ after-layer(2)"
        )
    with pytest.raises(UnsupportedError, match="newline='drop'.*have no newlines"):
        tokenprune.attach(model, "uniform | evict(5) @ before-llm(newline='drop')")
