"""LLaVA-NeXT, Video-LLaVA and families in lmms-eval: tiny random models, against our own API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tokenprune
from support import tiny_checkpoints
from support.families import FAMILIES
from support.family_checkpoints import saved
from support.lmms_eval_command import Harness
from tokenprune_adapters import pocket

pytest.importorskip("lmms_eval", reason="make test-eval installs it, in an environment of its own")

SPEC = "vtc-cls(keep=6)"


def rows(harness: Harness, name: str) -> Any:
    from datasets import load_from_disk

    return load_from_disk(str(harness.place / name))["test"]


def test_llava_next(harness: Harness, tmp_path: Path) -> None:
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    place = tiny_checkpoints.llava_next(tmp_path)
    model: Any = LlavaNextForConditionalGeneration.from_pretrained(place)
    processor = AutoProcessor.from_pretrained(place)

    def answers() -> list[str]:
        found = []
        for row in rows(harness, "pictures"):
            inputs = processor(
                images=row["picture"], text=pocket.prompt(row["question"]), return_tensors="pt"
            )
            output = model.generate(**inputs, max_new_tokens=1, do_sample=False)
            new = output[0, inputs["input_ids"].shape[1] :]
            found.append(processor.decode(new, skip_special_tokens=True).strip())
        return found

    everything = answers()
    with tokenprune.attach(model, SPEC) as pruned:
        wanted = answers()
    ran = harness.run(
        "pocket",
        "llava_hf_tokenprune",
        pretrained=place,
        prune=SPEC,
        report="report.json",
    )
    assert ran.code == 0, ran.words
    assert ran.answers == wanted != everything
    assert ran.report["model"] == "LlavaNextForConditionalGeneration"
    assert ran.report["tokens_before"] == pruned.report.tokens_before
    assert ran.report["tokens_after"] == 6 * len(wanted)


@pytest.mark.parametrize("name", ["qwen2.5-vl", "internvl", "llava-onevision", "idefics3"])
def test_families(harness: Harness, tmp_path: Path, name: str) -> None:
    """By lmms-eval's class for whatever transformers loads, in bfloat16 as it does."""
    from tokenprune.loading import load

    (tiny,) = (each for each in FAMILIES if each.name == name)
    place = saved(tiny, tmp_path / name)
    loaded = load(str(place), "cpu", "bfloat16")
    spec = "diverse(0.25)"

    def answers() -> list[str]:
        found = []
        for row in rows(harness, "pictures"):
            inputs = loaded.inputs(row["picture"], loaded.text(row["question"]))
            output = loaded.model.generate(**inputs, max_new_tokens=1, do_sample=False)
            new = output[0, inputs["input_ids"].shape[1] :]
            found.append(loaded.processor.decode(new, skip_special_tokens=True).strip())
        return found

    with tokenprune.attach(loaded.model, spec) as pruned:
        wanted = answers()
    ran = harness.run(
        "pocket", "huggingface_tokenprune", pretrained=place, prune=spec, report="report.json"
    )
    assert ran.code == 0, ran.words
    assert ran.answers == wanted
    assert len(set(wanted)) > 1
    assert ran.report["model"] == type(loaded.model).__name__
    assert ran.report["tokens_before"] == pruned.report.tokens_before
    assert ran.report["tokens_after"] == pruned.report.tokens_after < pruned.report.tokens_before


def test_video_llava(mended: Harness, tmp_path: Path) -> None:
    from lmms_eval.models.model_utils.load_video import read_video
    from transformers import VideoLlavaForConditionalGeneration, VideoLlavaProcessor

    place = tiny_checkpoints.video_llava(tmp_path)
    model: Any = VideoLlavaForConditionalGeneration.from_pretrained(place)
    processor = VideoLlavaProcessor.from_pretrained(place)

    def answers() -> list[str]:
        found = []
        for row in rows(mended, "films"):
            inputs = processor(
                text=f"USER: <video>{row['question']}? ASSISTANT:",
                videos=read_video(row["film"], num_frm=8),
                return_tensors="pt",
            )
            output = model.generate(**inputs, max_new_tokens=4)
            text = processor.batch_decode(output, skip_special_tokens=True)[0]
            found.append(text.split("ASSISTANT:")[-1].strip())
        return found

    everything = answers()
    with tokenprune.attach(model, SPEC) as pruned:
        wanted = answers()
    ran = mended.run(
        "films",
        "video_llava_tokenprune",
        pretrained=place,
        prune=SPEC,
        report="report.json",
    )
    assert ran.code == 0, ran.words
    assert ran.answers == wanted != everything
    assert ran.report["model"] == "VideoLlavaForConditionalGeneration"
    assert ran.report["tokens_before"] == pruned.report.tokens_before
    assert ran.report["tokens_after"] == 6 * len(wanted)
