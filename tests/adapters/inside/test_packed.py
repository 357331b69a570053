"""Conversations that share a row (padding-free fine-tuning): each is served as it is alone.

Position ids that start anew tell them apart, where neither a mask nor a cache does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune
from support import llava_next, video_llava
from support.flash import flash_attention
from support.llava import BOS, IMAGE, PATCHES, Row, collate, picture, tiny_llava
from tokenprune import UnsupportedError

from ..conftest import MakeLlava

FIRST = Row([BOS, 11, 12, picture(1), 13, 14, 15])
SECOND = Row([BOS, 21, picture(2), 22, 23, picture(3), 25])
TEXT = Row([BOS, 31, 32])
BARE = Row([picture(4), 41, 42, 43])  # nothing in front of its picture
ROWS = [FIRST, TEXT, SECOND, BARE]

BEFORE = [
    "cls-attention | evict(4) @ before-llm",
    "cls-attention | evict(4) @ before-llm(positions='original')",
    "tome(5) @ before-llm",
]
INSIDE = [
    "uniform | evict(4) @ after-layer(1)",
    "fastv | evict(4) @ after-layer(1)",
    "fastv(queries='text') | evict(4) @ after-layer(2, positions='reindexed')",
    "tome(5) @ after-layer(1)",
    "uniform | evict(0) @ after-layer(1)",
]
BOTH = ["cls-attention | evict(8) @ before-llm; fastv | evict(3) @ after-layer(2)"]


def packed(rows: list[Row]) -> dict[str, Any]:
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row.ids]]),
        "position_ids": torch.cat([torch.arange(len(row.ids)) for row in rows])[None],
        "pixel_values": torch.stack([image for row in rows for image in row.images]),
        "use_cache": False,
    }


def alone(row: Row) -> dict[str, Any]:
    inputs = {"input_ids": torch.tensor([row.ids]), "use_cache": False}
    return inputs | ({"pixel_values": torch.stack(row.images)} if row.images else {})


@torch.no_grad()
def apart(model: Any, spec: str, rows: list[Row]) -> Tensor:
    with tokenprune.attach(model, spec):
        return torch.cat([model(**alone(row)).logits[0] for row in rows])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("spec", BEFORE + INSIDE + BOTH)
def test_each_conversation_is_answered_as_it_is_alone(
    llava: MakeLlava, spec: str, attention: str
) -> None:
    model = llava(attention)
    wanted = apart(model, spec, ROWS)
    with torch.no_grad(), tokenprune.attach(model, spec):
        got = model(**packed(ROWS)).logits[0]
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("spec", [*BEFORE[:2], INSIDE[0], BOTH[0]])
def test_rows_of_a_batch_are_packed_each_in_its_own_way(llava: MakeLlava, spec: str) -> None:
    """Two rows of equal length with other seams and pictures, so that kept slots are ragged."""
    model = llava()
    one = [FIRST, Row([BOS, *range(40, 40 + PATCHES + 5)])]
    other = [Row([BOS, *range(60, 65)]), Row([BOS, picture(5), 21, picture(6), 22]), TEXT]
    width = sum(len(row.ids) for row in one)
    filler = width - sum(len(row.ids) for row in other)
    other[2] = Row([BOS, 31, 32, *range(70, 70 + filler)])
    each = [packed(rows) for rows in (one, other)]
    joined = {
        name: torch.cat([inputs[name] for inputs in each])
        for name in ("input_ids", "position_ids", "pixel_values")
    }
    wanted = torch.stack([apart(model, spec, rows) for rows in (one, other)])
    with torch.no_grad(), tokenprune.attach(model, spec):
        got = model(**joined, use_cache=False).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("queries", ["last", "text"])
@torch.no_grad()
def test_rows_with_fewer_conversations_are_ranked_too(llava: MakeLlava, queries: str) -> None:
    """The second stage ranks beside fillers: they stand where a row has no third conversation."""
    model = llava()
    spec = (
        f"fastv | evict(3) @ after-layer(1); fastv(queries={queries!r}) | evict(2) @ after-layer(2)"
    )
    one = [Row([7, picture(1), picture(2), 8]), Row([9, picture(3), 9])]
    width = sum(len(row.ids) for row in one)
    rows = [Row([BOS, picture(4), 9]), TEXT, Row([picture(5), 31])]
    other = [*rows, Row([BOS, *range(40, 39 + width - sum(len(row.ids) for row in rows))])]
    wanted = torch.stack([apart(model, spec, each) for each in (one, other)])
    inputs = [packed(each) for each in (one, other)]
    names = ("input_ids", "position_ids", "pixel_values")
    both = {name: torch.cat([each[name] for each in inputs]) for name in names}
    with tokenprune.attach(model, spec):
        got = model(**both, use_cache=False).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "spec",
    [
        "uniform | evict(0) @ after-layer(1)",
        "cls-attention | evict(4) @ before-llm; uniform | evict(0) @ after-layer(2)",
    ],
)
@torch.no_grad()
def test_what_would_be_left_without_a_token_is_refused(llava: MakeLlava, spec: str) -> None:
    """Its slots would show states of the conversation beside it, or of a filler."""
    model, bare = llava(), Row([picture(4), picture(5)])
    together = packed([FIRST, bare, TEXT])
    masked = collate([FIRST, bare])
    with tokenprune.attach(model, spec):
        for inputs in (together, alone(bare), masked):
            with pytest.raises(UnsupportedError, match="leaves nothing of a prompt, or of a conv"):
                model(**inputs)
        model(**packed([FIRST, Row([*bare.parts, 5]), TEXT]))
    with tokenprune.attach(model, spec.replace("evict(0)", "evict(1)")):
        model(**together)


@pytest.mark.parametrize("spec", [BEFORE[0], INSIDE[0]])
def test_one_row_may_be_packed_beside_one_that_is_not(llava: MakeLlava, spec: str) -> None:
    model, two = llava(), [FIRST, TEXT]
    one = [Row([*FIRST.parts, 16, 17, 18])]
    each = [packed(rows) for rows in (two, one)]
    joined = {
        name: torch.cat([inputs[name] for inputs in each])
        for name in ("input_ids", "position_ids", "pixel_values")
    }
    wanted = torch.stack([apart(model, spec, rows) for rows in (two, one)])
    with torch.no_grad(), tokenprune.attach(model, spec):
        got = model(**joined, use_cache=False).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("where", ["before-llm", "after-layer(1)", "after-layer(2)"])
def test_a_full_budget_changes_nothing(llava: MakeLlava, where: str, attention: str) -> None:
    model = llava(attention)
    with torch.no_grad():
        stock = model(**packed(ROWS)).logits
        with tokenprune.attach(model, f"uniform | evict({PATCHES}) @ {where}"):
            assert torch.equal(model(**packed(ROWS)).logits, stock)


@pytest.mark.parametrize("spec", [BEFORE[0], BEFORE[1], INSIDE[1], BOTH[0]])
def test_the_loss_is_the_mean_of_the_conversations_alone(llava: MakeLlava, spec: str) -> None:
    model = llava()

    def labels(ids: Tensor) -> Tensor:
        hidden = (ids == IMAGE) | (ids == BOS)
        return ids.masked_fill(hidden, -100)

    rows = [FIRST, TEXT, SECOND]
    whole = packed(rows)
    with torch.no_grad(), tokenprune.attach(model, spec):
        together = model(**whole, labels=labels(whole["input_ids"])).loss
        summed, counted = torch.zeros(()), 0
        for row in rows:
            given = labels(torch.tensor([row.ids]))
            number = int((given[:, 1:] != -100).sum())
            summed += model(**alone(row), labels=given).loss * number
            counted += number
    torch.testing.assert_close(together, summed / counted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("spec", [BEFORE[0], INSIDE[1]])
def test_under_gradient_checkpointing_there_is_no_cache(spec: str) -> None:
    """Models make none then, whatever their config says, so positions tell seams."""
    model, inputs = tiny_llava().train(), packed([FIRST, SECOND])
    with tokenprune.attach(model, spec):
        wanted = model(**inputs).logits
        del inputs["use_cache"]
        assert (model(**inputs).logits - wanted).abs().max() > 0.1  # with a cache, there are none
        model.gradient_checkpointing_enable()
        got = model(**inputs).logits
    assert torch.equal(got, wanted)


def test_positions_and_seams_of_a_shortened_row() -> None:
    """Reindexed positions start anew in each conversation, too."""
    model = tiny_llava()
    seen: list[Tensor] = []

    def note(llm: Any, args: object, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"])

    with torch.no_grad(), tokenprune.attach(model, BEFORE[0]):
        model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
        model(**packed([FIRST, SECOND]))
    assert seen[0].tolist() == [[*range(10), *range(13)]]


@pytest.mark.parametrize("spec", [BEFORE[0], BEFORE[1], INSIDE[0], INSIDE[1], BOTH[0]])
def test_flash_attention_gets_the_right_seams(spec: str) -> None:
    model = tiny_llava()
    with flash_attention(model, packed=True):
        wanted = apart(model, spec, ROWS)
        with torch.no_grad(), tokenprune.attach(model, spec):
            got = model(**packed(ROWS)).logits[0]
            torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
            names = ("input_ids", "position_ids", "pixel_values")
            two = {name: torch.cat([packed(ROWS)[name]] * 2) for name in names}
            with pytest.raises(UnsupportedError, match="batches of one row only, got 2 rows"):
                model(**two, use_cache=False)


def test_lengths_of_the_unshortened_prompt_are_refused(llava: MakeLlava) -> None:
    inputs = packed([FIRST, SECOND])
    lengths = torch.tensor([0, len(FIRST.ids), len(FIRST.ids) + len(SECOND.ids)])
    model = llava()
    refused = pytest.raises(UnsupportedError, match="cu_seq_lens tell where conversations")
    with torch.no_grad(), tokenprune.attach(model, BEFORE[0]), refused:
        model.model(**inputs, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)


@pytest.mark.parametrize("told", ["a cache", "a mask"])
def test_where_a_mask_or_a_cache_is_given_positions_tell_nothing(
    llava: MakeLlava, told: str
) -> None:
    """As in the model itself: a full budget changes nothing there, either."""
    model, inputs = llava(), packed([FIRST, SECOND])
    if told == "a cache":
        inputs["use_cache"] = True
    else:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        stock = model(**inputs).logits
        for where in ("before-llm", "after-layer(1)"):
            with tokenprune.attach(model, f"uniform | evict({PATCHES}) @ {where}"):
                assert torch.equal(model(**inputs).logits, stock)
        apart_ = torch.cat([model(**alone(row)).logits[0] for row in (FIRST, SECOND)])
    assert (stock[0] - apart_).abs().max() > 0.1


@torch.no_grad()
def test_watching_reads_the_last_token_of_each_conversation(llava: MakeLlava) -> None:
    model = llava()
    with tokenprune.watch(model) as seen:
        model(**packed(ROWS))
        together = seen.steps[0]
        each = []
        for row in (FIRST, SECOND, BARE):
            model(**alone(row))
            each.append(seen.steps[0])
    torch.testing.assert_close(together, torch.cat(each), rtol=0, atol=1e-6)


def joined(rows: list[Any], collate: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What padding-free collation makes of prompts, and each of them alone."""
    whole = dict(collate(rows))
    del whole["attention_mask"]
    whole["input_ids"] = torch.tensor([[token for row in rows for token in row.ids]])
    whole["position_ids"] = torch.cat([torch.arange(len(row.ids)) for row in rows])[None]
    each = [dict(collate([row])) for row in rows]
    for inputs in each:
        del inputs["attention_mask"]
    return whole, each


@pytest.mark.parametrize(
    "spec",
    [
        "cls-attention | evict(8) @ before-llm",
        "cls-attention | evict(8) @ before-llm(positions='original')",
        "fastv | evict(8) @ after-layer(1)",
        "cls-attention | evict(12) @ before-llm; fastv(queries='text') | evict(5) @ after-layer(2)",
    ],
)
@pytest.mark.parametrize("family", [llava_next, video_llava], ids=["next", "video"])
@torch.no_grad()
def test_conversations_with_tiles_and_videos(family: Any, spec: str) -> None:
    model = llava_next.tiny_llava_next() if family is llava_next else video_llava.tiny_video_llava()
    rows = family.prompts()
    whole, each = joined(rows, family.collate)
    with tokenprune.attach(model, spec):
        got = model(**whole, use_cache=False).logits[0]
        wanted = torch.cat([model(**inputs, use_cache=False).logits[0] for inputs in each])
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("masked", [True, False], ids=["a mask", "neither"])
def test_watching_takes_no_seams_from_positions_beside_a_mask(
    llava: MakeLlava, masked: bool
) -> None:
    """As in the model itself, whose full maps say what the last token of the row attends to."""
    model, inputs = llava("eager"), packed([FIRST, SECOND])
    if masked:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with tokenprune.watch(model) as seen:
        model(**inputs)
    maps = model(**inputs, output_attentions=True).attentions
    across = torch.stack(maps, 1).mean(2)[0, :, -1]  # (layers, slots)
    columns = (inputs["input_ids"][0] == IMAGE).nonzero().reshape(3, PATCHES)
    wanted = across[:, columns].transpose(0, 1)
    same = torch.isclose(seen.steps[0], wanted, rtol=0, atol=1e-6).flatten(1).all(1)
    assert same.tolist() == [masked, True, True]  # alone, the first picture has its own last token
