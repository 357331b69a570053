"""Commands on families: loaded with their processors from a folder, told and drawn in place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops

import tokenprune
from support.families import FAMILIES, IMAGE, Tiny
from support.family_checkpoints import saved
from tokenprune import UnsupportedError
from tokenprune.analysis.fate import DROPPED
from tokenprune.batch import Answerer
from tokenprune.cli.seen import Seen
from tokenprune.loading import Loaded, load
from tokenprune_adapters import pocket

SPEC = "diverse(0.25)"
CUT = ("llava-next", "internvl", "llava-onevision", "llava-next-video", "smolvlm", "idefics3")
"""Families that cut this picture into tiles."""
STATES = ("qwen3.5", "qwen3.5-moe")
"""Families whose layers have states, after which nothing can be left out."""
PLACES = ("before-llm", "after-layer(2)")
SQUARE = ("llava", "video-llava", "vipllava")
"""Families that take the middle of a picture."""


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda each: each.name)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    each: Tiny = request.param
    return each


@pytest.fixture(scope="module")
def folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny, tmp_path_factory.mktemp("family") / tiny.name)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return load(str(folder), "cpu", "float32")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """32 x 24 pixels: of a size that no processor of ours needs to change without cutting it."""
    return pocket.draw(4).picture.resize((32, 24))


def answered(loaded: Loaded, picture: Image.Image, spec: str = SPEC) -> tuple[Any, Any, Any]:
    """Inputs, report and reduction of one question."""
    inputs = loaded.inputs(picture, loaded.text("word7 word8"))
    with tokenprune.attach(loaded.model, spec) as pruned, torch.no_grad():
        loaded.model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return inputs, pruned.report, pruned.last


def test_a_drawing_shows_what_is_kept_in_its_place(
    tiny: Tiny, loaded: Loaded, picture: Image.Image
) -> None:
    inputs, report, reduction = answered(loaded, picture)
    seen = Seen.of(loaded, inputs)
    if tiny.name in CUT:
        assert len(seen.crops) > 1
    elif tiny.name not in SQUARE:
        (crop,) = seen.crops
        assert crop.size == picture.size
        low, high = zip(*ImageChops.difference(crop, picture).getextrema(), strict=True)
        assert max(high) <= 1, (low, high)
    (only,) = report.kept
    kept = set(zip(only.crop, only.patch, strict=True))
    assert len(kept) == report.tokens_after == sum(image.after for image in report.images)
    slots = seen.fate(reduction).crops
    flat = [slot for crop in slots for slot in crop]
    assert sum(slot is not None for slot in flat) == report.tokens_before
    alive = {
        (crop, patch)
        for crop, each in enumerate(slots)
        for patch, slot in enumerate(each)
        if slot not in (None, DROPPED)
    }
    assert alive == kept
    # Kept squares are copied, all others are dark: of a bright picture, only these are bright.
    bright = Seen(tuple(Image.new("RGB", c.size, "white") for c in seen.crops), seen.grid, None)
    drawn = bright.kept(report.kept, 1)
    high, wide = seen.grid
    square = (seen.crops[0].width // wide) * (seen.crops[0].height // high)
    columns = -(-(len(seen.crops) ** 0.5) // 1)
    for number in range(len(seen.crops)):
        width, height = (side + 6 for side in seen.crops[0].size)
        left, top = number % int(columns) * width, number // int(columns) * height
        part = drawn.crop((left, top, left + width - 6, top + height - 6)).convert("L")
        lit = part.histogram()[255]
        assert lit == square * sum(crop == number for crop, _ in kept)


def test_a_budget_is_for_each_picture_of_a_prompt(
    tiny: Tiny, loaded: Loaded, picture: Image.Image
) -> None:
    """Cut into however many tiles: by the prompt of the family's own processor."""
    pictures = [picture, picture.resize((64, 16)), picture.resize((16, 16)).convert("L")]
    pictures = [each.convert("RGB") for each in pictures]
    about = {"role": "user", "content": []}
    for n in range(3):
        about["content"] += [{"type": "image"}, {"type": "text", "text": f"word{7 + n}"}]
    text = loaded.processor.apply_chat_template([about], add_generation_prompt=True)
    made = loaded.processor(images=pictures, text=text, return_tensors="pt")
    before = {}
    wheres = PLACES[:1] if tiny.name in STATES else PLACES
    for where in wheres:
        with tokenprune.attach(loaded.model, f"random | evict(4) @ {where}") as pruned:
            loaded.model.generate(**made, max_new_tokens=1, do_sample=False)
        images = pruned.report.images
        assert [each.after for each in images] == [4] * 3
        before[where] = [each.before for each in images]
        if tiny.split is not None:
            assert [each % 16 for each in before[where]] == [0] * 3
            assert sum(before[where]) == int((made["input_ids"] == IMAGE).sum())
        if tiny.name == "idefics3":
            assert len(set(before[where])) > 1
    assert all(each == before["before-llm"] for each in before.values())


def test_merged_tokens_are_drawn_by_group(loaded: Loaded, picture: Image.Image) -> None:
    inputs, report, reduction = answered(loaded, picture, "tome(0.5)")
    fate = Seen.of(loaded, inputs).fate(reduction)
    assert all(slot != DROPPED for crop in fate.crops for slot in crop)
    assert len(fate.groups) == int((reduction.plan.counts() > 1).sum())
    assert report.tokens_after == sum(reduction.plan.lengths)


def test_commands(
    tiny: Tiny,
    folder: Path,
    loaded: Loaded,
    picture: Image.Image,
    tmp_path: Path,
    tokenprune: Callable[..., Any],
) -> None:
    picture.save(tmp_path / "picture.png")
    about = ("--model", folder, "--device", "cpu")
    shown = ("--image", tmp_path / "picture.png", "--prompt", "word7 word8", "--prune", SPEC)
    drawn = tmp_path / "overlay.png"
    _, report, _ = answered(loaded, picture)
    short = ("--max-new-tokens", 2)
    more = (*short, "--runs", 0, "--compare", "--overlay", drawn)
    told = tokenprune("run", *about, *shown, *more).output
    (line,) = (line.split() for line in told.splitlines() if "visual tokens" in line)
    assert line[-2:] == [str(report.tokens_before), str(report.tokens_after)]
    assert Image.open(drawn).size[0] >= 384
    sheet = tmp_path / "sheet.png"
    tokenprune("picture", *about, *shown, *short, "--out", sheet)
    assert sheet.is_file()
    heat = ("picture", *about, *shown[:4], *short, "--heat", "--prune", "fastv @ after-layer(2)")
    if tiny.name in STATES:
        with pytest.raises(UnsupportedError, match="nothing can be left out after a layer"):
            tokenprune(*heat, "--out", tmp_path / "heat.png")
    else:
        tokenprune(*heat, "--out", tmp_path / "heat.png")
        assert (tmp_path / "heat.png").is_file()

    data = tmp_path / "questions.jsonl"
    rows = [{"image": "picture.png", "question": f"word{n}", "answers": ["word9"]} for n in (7, 8)]
    data.write_text("\n".join(map(json.dumps, rows)))
    asked = ("--data", data, "--prune", "diverse({keep})", "--keep", "0.25", "--batch", 2)
    tokenprune("bench", *about, *asked, *short, "--out", tmp_path)
    written = json.loads((tmp_path / "bench.json").read_text())["rows"]
    (row,) = (row for row in written if row["kind"] == "method")
    assert row["tokens"][-1][1] == report.tokens_after


def test_a_batch_counts_tokens_of_each_picture(
    folder: Path, loaded: Loaded, picture: Image.Image
) -> None:
    wide = picture.resize((64, 16))
    answers = Answerer(str(folder), SPEC, prompt="word7 word8", device="cpu", max_new_tokens=1)(
        {"image": [picture, wide, picture], "prompt": [None, "word9", None]}
    )
    for number, each in enumerate((picture, wide, picture)):
        _, report, _ = answered(loaded, each)
        assert answers["tokens_before"][number] == report.tokens_before
        assert answers["tokens_after"][number] == report.tokens_after
