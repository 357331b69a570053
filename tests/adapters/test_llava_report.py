"""The numbers of a report, counted once more without tokenprune."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokenprune
from support.llava import PATCHES, Row, collate, generate, picture, prompts, spec, tiny_llava
from support.outputs import shown_features
from tokenprune import AttachError, ImageReport

from .conftest import MakeLlava

BYTES = 4  # of a float32


def cache_bytes(slots: int, rows: int, model: Any) -> int:
    """Keys and values of `slots` slots in all layers, from the config alone."""
    text = model.config.text_config
    channels = text.hidden_size // text.num_attention_heads
    per_layer = 2 * rows * text.num_key_value_heads * slots * channels * BYTES
    return int(text.num_hidden_layers * per_layer)


@pytest.mark.parametrize(("keep", "kept"), [(4, 4), (0.3, 5), (PATCHES, PATCHES), (99, PATCHES)])
def test_tokens_and_bytes(llava: MakeLlava, keep: float, kept: int) -> None:
    model = llava()
    with tokenprune.attach(model, spec(keep)) as attachment:
        generate(model, collate(prompts()))
    report = attachment.report
    assert report.images == (ImageReport(PATCHES, kept),) * 3
    assert (report.calls, report.tokens_before, report.tokens_after) == (1, 48, 3 * kept)
    assert report.selector_seconds > 0
    if kept == PATCHES:
        assert report.kv_bytes_saved == 0
        return
    width = collate(prompts())["input_ids"].shape[1]
    longest = max(len(row.ids) - (PATCHES - kept) * len(row.images) for row in prompts())
    assert report.kv_bytes == cache_bytes(longest, 3, model)
    assert report.kv_bytes_vanilla == cache_bytes(width, 3, model)
    assert report.kv_bytes_saved == cache_bytes(width - longest, 3, model)


def test_bytes_are_those_that_vanilla_really_stores(llava: MakeLlava) -> None:
    model = llava()
    with torch.no_grad():
        vanilla = model(**collate(prompts()), use_cache=True).past_key_values
        with tokenprune.attach(model, spec(4)) as attachment:
            short = model(**collate(prompts()), use_cache=True).past_key_values
    stored, whole = (
        sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        for cache in (short, vanilla)
    )
    assert (attachment.report.kv_bytes, attachment.report.kv_bytes_vanilla) == (stored, whole)


def test_calls_add_up_and_images_are_the_latest(llava: MakeLlava) -> None:
    model = llava()
    with tokenprune.attach(model, spec(4)) as attachment:
        with pytest.raises(AttachError, match="no image has been reduced yet"):
            _ = attachment.last
        assert str(attachment.report) == "no image has been reduced yet"
        generate(model, collate(prompts()))
        generate(model, collate([Row([1, picture(1), 5])]))
        generate(model, collate([Row([1, 5])]))  # text only: nothing to reduce
    report = attachment.report
    assert (report.calls, report.tokens_before, report.tokens_after) == (2, 64, 16)
    assert report.images == (ImageReport(PATCHES, 4),)
    assert attachment.last.plan.lengths == (4,)
    lines = str(report).splitlines()
    assert lines[0].split() == ["visual", "tokens", "16", "->", "4"]
    assert "(2 calls)" in lines[1]
    assert lines[-1].endswith("saved")


def test_a_decoding_step_does_not_change_the_bytes(llava: MakeLlava) -> None:
    """They are those of the latest prefill."""
    model = llava()
    reports = []
    for steps in (1, 6):
        with tokenprune.attach(model, spec(4)) as attachment:
            generate(model, collate(prompts()), steps=steps)
        reports.append(attachment.report)
    assert reports[0].kv_bytes == reports[1].kv_bytes > 0


def test_half_precision_halves_the_bytes() -> None:
    model = tiny_llava().to(torch.bfloat16)
    inputs = collate(prompts())
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with tokenprune.attach(model, spec(4)) as attachment:
        generate(model, inputs, steps=1)
    width = inputs["input_ids"].shape[1]
    assert attachment.report.kv_bytes_vanilla == cache_bytes(width, 3, model) // 2


def test_image_features_of_an_output_are_those_that_entered(llava: MakeLlava) -> None:
    """The caller sees no marks."""
    model = llava()
    with torch.no_grad():
        with tokenprune.attach(model, spec(4)) as attachment:
            seen = shown_features(model(**collate(prompts())))
        vanilla = shown_features(model(**collate(prompts())))
    kept = torch.cat(
        [
            image[indices]
            for image, indices in zip(
                vanilla.reshape(3, PATCHES, -1), attachment.last.plan.anchors, strict=True
            )
        ]
    )
    assert seen.isfinite().all()
    torch.testing.assert_close(seen, kept, rtol=0, atol=1e-6)
