"""The report of stages after layers: tokens per layer, KV bytes, calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import tokenprune
from support.llava import BOS, PATCHES, Row, collate, generate, picture, prompts
from tokenprune import BeforeLLM, ImageReport, Kept, Plan, Reducer, Strategy

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
    assert report.calls == 2
    assert (report.tokens_before, report.tokens_after) == (48 + 16, 12 + 4)


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


COPIES = pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}],
    ids=["beams", "sequences"],
)


@COPIES
def test_one_picture_is_one_picture_however_often_generate_copies_it(
    llava: Any, options: dict[str, Any]
) -> None:
    with tokenprune.attach(llava(), "fastv | evict(4) @ after-layer(1)") as attachment:
        generate(llava(), collate(prompts()[:1]), steps=3, **options)
    report = attachment.report
    assert report.images == (ImageReport(PATCHES, 4),)
    assert report.layers == ((0, 16), (1, 4))
    assert (report.calls, report.tokens_before, report.tokens_after) == (1, 16, 4)
    assert len(report.kept) == 1
    assert attachment.last.plan.lengths == (4,)


@COPIES
def test_copies_leave_the_report_as_it_is_without_them(llava: Any, options: dict[str, Any]) -> None:
    """In a batch whose prompts have one picture, two, and none."""
    reports, plans = [], []
    for each in ({}, options):
        with tokenprune.attach(llava(), "fastv | evict(4) @ after-layer(1)") as attachment:
            generate(llava(), collate(prompts()), steps=2, **each)
        reports.append(attachment.report)
        plans.append(attachment.last.plan.anchors)
    assert reports[0].images == reports[1].images == (ImageReport(PATCHES, 4),) * 3
    assert reports[0].layers == reports[1].layers
    assert reports[0].kept == reports[1].kept
    assert [kept.number for kept in reports[1].kept] == [0, 1, 2]
    assert torch.equal(plans[0], plans[1])


@COPIES
@pytest.mark.parametrize("before", [[], ["cls-attention | evict(9)"]], ids=["inside", "both"])
def test_a_picture_that_was_given_twice_counts_twice(
    llava: Any, before: list[str], options: dict[str, Any]
) -> None:
    """Asked about in other words, it keeps other patches; copies of the prompts change nothing."""
    twice = [Row([BOS, picture(1), 5, 6]), Row([BOS, 7, picture(1), picture(2), picture(1), 8, 9])]
    kept = []
    for each in ({}, options):
        stages = [*before, "fastv | evict(4) @ after-layer(1)"]
        with tokenprune.attach(llava(), *stages) as attachment:
            generate(llava(), collate(twice), steps=2, **each)
        assert len(attachment.report.images) == 4
        assert attachment.report.tokens_before == 4 * PATCHES
        kept.append(attachment.report.kept)
    assert kept[0] == kept[1]
    assert len({kept[0][n].patch for n in (0, 1, 3)}) > 1


@torch.no_grad()
def test_prompts_that_were_expanded_by_hand(llava: Any) -> None:
    """Features that were encoded once and repeated are copies; pixels given twice are not."""
    inputs = collate(prompts()[:1])
    pixels = inputs.pop("pixel_values")
    expanded = {name: value.repeat(3, 1) for name, value in inputs.items()}
    with tokenprune.attach(llava(), "fastv | evict(4) @ after-layer(1)") as attachment:
        encoded = llava().model.get_image_features(pixels)
        encoded.pooler_output = [*encoded.pooler_output] * 3
        llava()(**expanded, mm_encoder_outputs={"image": encoded})
        assert attachment.report.images == (ImageReport(PATCHES, 4),)
        llava()(**expanded, pixel_values=pixels.repeat(3, 1, 1, 1))
        assert attachment.report.images == (ImageReport(PATCHES, 4),) * 3


def test_kept_is_counted_over_all_stages(llava: Any) -> None:
    """Patches of the picture, not of what the stage before has left."""
    stages = ["cls-attention | evict(9)", "fastv | evict(5) @ after-layer(1)"]
    with tokenprune.attach(llava(), stages[0]) as attachment:
        generate(llava(), collate(prompts()), steps=1)
    before = attachment.report.kept
    with tokenprune.attach(llava(), *stages) as attachment:
        generate(llava(), collate(prompts()), steps=1)
    inside, plan = attachment.report.kept, attachment.last.plan
    assert inside == tuple(
        Kept("image", number, (0,) * 5, tuple(each.patch[slot] for slot in slots))
        for number, (each, slots) in enumerate(zip(before, plan.anchors.tolist(), strict=True))
    )


def test_layers_tell_of_stages_after_everything_was_withdrawn(llava: Any) -> None:
    stages = ["vtw(layer=1)", "fastv | evict(4) @ after-layer(2)"]
    with tokenprune.attach(llava(), *stages) as attachment:
        generate(llava(), collate(prompts()), steps=2)
    report = attachment.report
    assert report.layers == ((0, 48), (1, 0), (2, 0))
    assert report.images == (ImageReport(PATCHES, 0),) * 3
    assert report.kept == tuple(Kept("image", n, (), ()) for n in range(3))


def test_layers_tell_of_stages_after_nothing_came_in(llava: Any) -> None:
    class Nothing(Reducer):
        def plan(self, tokens: Any, scores: Any, signals: Any) -> Plan:
            return Plan.select(torch.zeros_like(tokens.mask))

    nothing, later = Strategy(Nothing()).at(BeforeLLM()), "fastv | evict(4) @ after-layer(2)"
    with tokenprune.attach(llava(), nothing, later) as attachment:
        generate(llava(), collate(prompts()), steps=2)
    report = attachment.report
    assert report.layers == ((0, 0), (2, 0))
    assert report.images == (ImageReport(PATCHES, 0),) * 3
    assert (report.tokens_before, report.tokens_after) == (48, 0)


def test_bytes_are_of_the_latest_prefill_also_without_a_picture(llava: Any) -> None:
    model = llava()
    row, more = prompts()[0], [41, 42, 43]
    with tokenprune.attach(model, "fastv | evict(4) @ after-layer(1)") as attachment:
        with torch.no_grad():
            cache = model(**collate([row]), use_cache=True).past_key_values
            model(input_ids=torch.tensor([more]), past_key_values=cache)
        whole, short = len(row.ids) + 3, len(row.ids) + 3 - (PATCHES - 4)
        assert attachment.report.kv_bytes == kv_bytes([whole, short, short], rows=1)
        assert attachment.report.kv_bytes_vanilla == kv_bytes([whole] * LAYERS, rows=1)
        generate(model, collate([Row([BOS, 5, 6])]), steps=4)
        assert attachment.report.kv_bytes == kv_bytes([3] * LAYERS, rows=1)
        assert attachment.report.kv_bytes_saved == 0


@torch.no_grad()
@pytest.mark.parametrize("stages", [[], ["cls-attention | evict(9)"]], ids=["inside", "both"])
def test_a_call_that_fails_half_way_leaves_the_report_as_it_was(llava: Any, stages: Any) -> None:
    def fails(*_: object) -> None:
        raise ConnectionError

    model = llava()
    with tokenprune.attach(model, *stages, "fastv | evict(4) @ after-layer(1)") as attachment:
        model(**collate(prompts()[:1]))
        before = attachment.report
        handle = model.model.language_model.layers[2].register_forward_pre_hook(fails)
        with pytest.raises(ConnectionError):
            model(**collate(prompts()))
        handle.remove()
        after = replace(attachment.report, selector_seconds=before.selector_seconds)
    assert after == before
    assert attachment.last.plan.lengths == (4,)
