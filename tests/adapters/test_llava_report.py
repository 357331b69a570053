"""The numbers of a report, counted once more without tokenprune."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokenprune
from support.llava import PATCHES, Row, collate, generate, picture, prompts, spec, tiny_llava
from support.outputs import shown_features
from tokenprune import AttachError, ImageReport, Kept

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


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}],
    ids=["beams", "sequences"],
)
def test_copies_that_generate_makes_are_not_counted(
    llava: MakeLlava, options: dict[str, Any]
) -> None:
    with tokenprune.attach(llava(), spec(4)) as attachment:
        llava().generate(**collate(prompts()), max_new_tokens=3, eos_token_id=None, **options)
    report = attachment.report
    assert report.images == (ImageReport(PATCHES, 4),) * 3
    assert report.layers == ((0, 12),)
    assert (report.calls, report.tokens_before, report.tokens_after) == (1, 48, 12)
    assert len(report.kept) == len(attachment.last.plan.lengths) == 3


def test_a_picture_that_was_given_twice_counts_twice(llava: MakeLlava) -> None:
    twice = [Row([1, picture(1), 5]), Row([1, picture(1), 6, 7])]
    with tokenprune.attach(llava(), spec(4)) as attachment:
        generate(llava(), collate(twice), num_beams=2)
    assert attachment.report.images == (ImageReport(PATCHES, 4),) * 2
    first, second = attachment.report.kept
    assert (first.number, second.number) == (0, 1)
    assert first.patch == second.patch


def test_kept_tells_the_patches_of_each_picture(llava: MakeLlava) -> None:
    with tokenprune.attach(llava(), spec(4)) as attachment:
        generate(llava(), collate(prompts()), steps=1)
    anchors = attachment.last.plan.anchors.tolist()
    assert attachment.report.kept == tuple(
        Kept("image", number, (0,) * 4, tuple(row)) for number, row in enumerate(anchors)
    )


def test_kept_tells_the_anchor_of_a_merged_token(llava: MakeLlava) -> None:
    with tokenprune.attach(llava(), "tome(5)") as attachment:
        generate(llava(), collate(prompts()[:1]), steps=1)
    plan = attachment.last.plan
    assert plan.members is not None
    members = [row.nonzero().flatten().tolist() for row in plan.dense()[0]]
    assert max(map(len, members)) > 1
    (kept,) = attachment.report.kept
    assert kept.patch == tuple(min(each) for each in members)


def test_bytes_are_of_the_latest_call_also_without_a_picture(llava: MakeLlava) -> None:
    model = llava()
    with tokenprune.attach(model, spec(4)) as attachment:
        generate(model, collate(prompts()), steps=2)
        pictures = attachment.report
        generate(model, collate([Row([1, 5, 6, 7])]), steps=3)
        text = attachment.report
        assert text.kv_bytes == text.kv_bytes_vanilla == cache_bytes(4, 1, model)
        assert text.images == pictures.images  # of the latest call with pictures
        generate(model, collate([Row([1])]), steps=3)
        assert attachment.report.kv_bytes == cache_bytes(1, 1, model)
        with torch.no_grad():
            model(**collate([Row([1, 5, 6, 7])]), use_cache=False)
        assert attachment.report.kv_bytes == attachment.report.kv_bytes_vanilla == 0


@torch.no_grad()
def test_bytes_are_of_the_latest_turn_also_without_a_picture(llava: MakeLlava) -> None:
    model = llava()
    first, more = collate([Row([1, 11, picture(1), 12])]), torch.tensor([[21, 22, 23]])
    width = first["input_ids"].shape[1]
    short = width - (PATCHES - 4)
    with tokenprune.attach(model, spec(4)) as attachment:
        cache = model(**first, use_cache=True).past_key_values
        assert attachment.report.kv_bytes == cache_bytes(short, 1, model)
        cache = model(input_ids=more, past_key_values=cache).past_key_values
    report = attachment.report
    assert report.kv_bytes == cache_bytes(short + 3, 1, model)
    assert report.kv_bytes == sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
    assert report.kv_bytes_vanilla == cache_bytes(width + 3, 1, model)


def test_bytes_where_everything_is_kept(llava: MakeLlava) -> None:
    model = llava()
    with tokenprune.attach(model, spec(1.0)) as attachment:
        generate(model, collate(prompts()), steps=2)
    width = collate(prompts())["input_ids"].shape[1]
    report = attachment.report
    assert report.kv_bytes == report.kv_bytes_vanilla == cache_bytes(width, 3, model)


def test_a_static_cache_of_a_text_has_no_bytes_to_tell(llava: MakeLlava) -> None:
    model = llava()
    with tokenprune.attach(model, spec(4)) as attachment:
        generate(model, collate(prompts()), steps=2)
        generate(model, collate([Row([1, 5, 6])]), steps=2, cache_implementation="static")
    assert attachment.report.kv_bytes == attachment.report.kv_bytes_vanilla == 0
