"""Budgets of families: what a number of tokens is for."""

from __future__ import annotations

import pytest
import torch

import tokenprune
from support.families import FAMILIES, IMAGE, Row, case_of, collate
from tokenprune import UnsupportedError

NAMED = {tiny.name: tiny for tiny in FAMILIES}


TILES = [name for name in ("internvl", "smolvlm", "idefics3") if name in NAMED]


@pytest.mark.parametrize("where", ["before-llm", "after-layer(2)"])
@pytest.mark.parametrize("name", TILES)
def test_budgets_of_pictures_and_of_tiles(name: str, where: str) -> None:
    """Of a picture in two tiles and one in one; beams are copies, which nobody counts."""
    case = case_of(NAMED[name])
    model, inputs = case.build("sdpa"), case.inputs((0,))
    for spec, left in (
        ("random | evict(5)", [5, 5]),
        ("random | evict(0.25)", [8, 4]),
        ("random | evict(5, per='crop')", [5, 5, 5]),
        ("random | evict(0.25, per='crop')", [4, 4, 4]),
    ):
        for beams in (1, 3):
            with tokenprune.attach(model, f"{spec} @ {where}") as attachment:
                case.generate(model, inputs, 2, num_beams=beams)
            assert [each.after for each in attachment.report.images] == left
    assert attachment.report.calls == 1


@pytest.mark.parametrize("name", TILES)
def test_what_is_random_is_of_the_whole_picture(name: str) -> None:
    """Two pictures with the same first tile draw other numbers, and the same picture the same."""
    case = case_of(NAMED[name])
    model, inputs = case.build("sdpa"), dict(case.inputs((0,)))
    pixels = inputs["pixel_values"].clone()
    tiles = pixels if pixels.ndim == 4 else pixels[0]
    kept = []
    for second in (1.0, -1.0, 1.0):
        tiles[1] = tiles[1].abs() * second
        with torch.no_grad(), tokenprune.attach(model, "random | evict(8)") as attachment:
            model(**inputs | {"pixel_values": pixels})
        kept.append(attachment.report.kept[0])
    assert kept[0] == kept[2]
    assert kept[0] != kept[1]
    assert set(kept[0].crop) == {0, 1}


@pytest.mark.parametrize("name", TILES)
def test_tiles_of_pictures_of_one_size_are_told_apart(name: str) -> None:
    tiny = NAMED[name]
    model = tiny.make("sdpa")
    inputs = collate(tiny, [Row([1, 11, ("image", 1, 2), 12, ("image", 2, 2), 13])])
    if name != "internvl":  # whose tiles of all prompts are in a row
        inputs["pixel_values"] = inputs["pixel_values"].flatten(0, 1)[None]
    for where in ("before-llm", "after-layer(1)"):
        with torch.no_grad(), tokenprune.attach(model, f"random | evict(1.0) @ {where}") as pruned:
            model(**inputs)
        assert [each.crop for each in pruned.report.kept] == [(0,) * 16 + (1,) * 16] * 2
        assert [each.patch for each in pruned.report.kept] == [tuple(range(16)) * 2] * 2


@pytest.mark.parametrize("name", TILES)
def test_tiles_whose_prompt_is_not_seen_are_refused(name: str) -> None:
    case = case_of(NAMED[name])
    model, inputs = case.build("sdpa"), dict(case.inputs((0,)))
    with tokenprune.attach(model, "uniform | evict(5)"):
        with pytest.raises(UnsupportedError, match="(drop|unset) prefill_chunk_size, or"):
            case.generate(model, inputs, 2, prefill_chunk_size=7)
        ids = inputs.pop("input_ids")
        embeds = model.get_input_embeddings()(ids)
        with pytest.raises(UnsupportedError, match="pass input_ids instead of inputs_embeds, or g"):
            model(**inputs, inputs_embeds=embeds)
        (first, *_) = (ids == IMAGE).nonzero()[:, 1].tolist()
        broken = torch.cat([ids[:, : first + 3], ids[:, :1], ids[:, first + 3 :]], dim=1)
        mask = torch.ones_like(broken)
        with pytest.raises(UnsupportedError, match="a tile has 16 tokens, but 3 placeholders"):
            model(**inputs | {"input_ids": broken, "attention_mask": mask})


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
