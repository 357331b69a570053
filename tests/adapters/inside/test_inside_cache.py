"""The KV cache of a prompt that shrinks on its way: lengths per layer, turns, copies and crops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import tokenprune
from support.flash import flash_attention
from support.inside_oracle import Cut, Recompute, evict, greedy, say
from support.llava import PATCHES, Answer, Row, collate, generate, picture, prompts
from tokenprune import AttachError, UnsupportedError

POSITIONS = pytest.mark.parametrize("positions", ["original", "reindexed"])
TEXT = [[51, 52, 53], [54, 55, 56], [57, 58, 59]]
RAGGED = [[51, 52, 53], [54], [57, 58]]
WITH_IMAGES = [[51, picture(7), 53], [54], [55, picture(8), 56, 57]]
STAGES = ((1, 9, "cls"), (2, 4, "last"))


def specs(positions: str, before: int | None = None) -> list[str]:
    names = {"last": "fastv", "cls": "cls-attention"}
    inside = [
        f"{names[by]} | evict({keep}) @ after-layer({layer}, positions={positions!r})"
        for layer, keep, by in STAGES
    ]
    return [*inside, *([f"cls-attention | evict({before}) @ before-llm"] if before else [])]


def readers(model: Any, positions: str, **options: Any) -> list[Recompute]:
    cuts = [Cut(layer, evict(keep, by), positions) for layer, keep, by in STAGES]
    return [Recompute(model, row, cuts, **options) for row in prompts()]


def next_turn(before: dict[str, Tensor], answer: Answer, turn: list[list[Any]]) -> dict[str, Any]:
    """What is passed to `generate`: all ids, all of the mask, but new pictures only."""
    new: dict[str, Any] = collate([Row(list(each)) for each in turn])
    new["input_ids"] = torch.cat([before["input_ids"], answer.text, new["input_ids"]], 1)
    ones = torch.ones_like(answer.text)
    new["attention_mask"] = torch.cat([before["attention_mask"], ones, new["attention_mask"]], 1)
    return new


def check(answer: Answer, wanted: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(answer.text, wanted[0])
    torch.testing.assert_close(answer.logits, wanted[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("before", [None, 12])
def test_key_value_lengths(llava: Any, before: int | None) -> None:
    """Early layers hold S slots, late ones S'; all answer for the prompt that the caller knows."""
    model, steps = llava(), 6
    inputs = collate(prompts(), extra=3)
    with tokenprune.attach(model, *specs("original", before)):
        answer = generate(model, inputs, steps=steps)
    width = inputs["input_ids"].shape[1]

    def widest(keep: int) -> int:
        return max(len(row.ids) - (PATCHES - keep) * len(row.images) for row in prompts())

    first = width if before is None else widest(before)
    lengths = [first, widest(9), widest(4)]
    for layer, length in zip(answer.cache.layers, lengths, strict=True):
        assert layer.keys.shape[-2] == layer.values.shape[-2] == length + steps - 1
        assert layer.get_seq_length() == width + steps - 1
    assert answer.cache.get_seq_length() == width + steps - 1


@POSITIONS
@pytest.mark.parametrize("turn", [TEXT, RAGGED, WITH_IMAGES], ids=["text", "ragged", "images"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("before", [None, 12])
def test_turns(
    llava: Any, positions: str, turn: list[list[Any]], attention: str, before: int | None
) -> None:
    """New images are ranked by their own turn; what earlier turns dropped stays dropped."""
    model, inputs = llava(attention), collate(prompts())
    with tokenprune.attach(model, *specs(positions, before)):
        answers = [generate(model, inputs, steps=3)]
        for each in (turn, TEXT):
            inputs = next_turn(inputs, answers[-1], each)
            cache = answers[-1].cache
            answers.append(generate(model, inputs, steps=3, past_key_values=cache))
    rows = readers(model, positions, before=before)
    for answer, each in zip(answers, (turn, TEXT, TEXT), strict=True):
        check(answer, say(rows, 3))
        hear(rows, answer, each)


def hear(rows: list[Recompute], answer: Answer, turn: list[list[Any]]) -> None:
    """The oracle reads on: what was said, and the next turn."""
    for row, text, new in zip(rows, answer.text.tolist(), turn, strict=True):
        row.extend([*text, *new])


@POSITIONS
def test_a_turn_with_an_image_under_flash(llava: Any, positions: str) -> None:
    """One row without padding: gaps in its positions must not look like packed sequences."""
    model, inputs = llava(), collate(prompts()[:1])
    rows = readers(model, positions)[:1]
    with flash_attention(model), tokenprune.attach(model, *specs(positions)):
        answer = generate(model, inputs, steps=3)
        inputs = next_turn(inputs, answer, WITH_IMAGES[:1])
        second = generate(model, inputs, steps=3, past_key_values=answer.cache)
    check(answer, say(rows, 3))
    hear(rows, answer, WITH_IMAGES[:1])
    check(second, say(rows, 3))


@POSITIONS
def test_a_turn_of_one_word_is_read_together_with_the_latest(llava: Any, positions: str) -> None:
    """Two queries behind a cache without padding: layers get a mask, for no flag says it."""
    model, inputs, turn = llava(), collate(prompts()[:1]), [[51]]
    rows = readers(model, positions)[:1]
    with tokenprune.attach(model, *specs(positions)):
        first = generate(model, inputs, steps=3)
        second = generate(
            model, next_turn(inputs, first, turn), steps=3, past_key_values=first.cache
        )
    say(rows, 1)
    hear(rows, first, turn)
    check(second, say(rows, 3))


@POSITIONS
def test_a_copied_cache_goes_its_own_way(llava: Any, positions: str) -> None:
    model, inputs = llava(), collate(prompts())
    with tokenprune.attach(model, *specs(positions)):
        first = generate(model, inputs, steps=3)
        copied = copy.deepcopy(first.cache)
        answers = [
            generate(model, next_turn(inputs, first, turn), steps=3, past_key_values=cache)
            for turn, cache in ((WITH_IMAGES, copied), (TEXT, first.cache))
        ]
    for turn, answer in zip((WITH_IMAGES, TEXT), answers, strict=True):
        rows = readers(model, positions)
        say(rows, 1)
        hear(rows, first, turn)
        check(answer, say(rows, 3))


def test_an_image_in_a_second_turn_only(llava: Any) -> None:
    """A cache that began as stock is continued by an attached model."""
    model = llava()
    batch = [Row([1, 31, 32, 33]), Row([1, 41])]
    with tokenprune.attach(model, *specs("original")):
        first = generate(model, collate(batch), steps=3)
        assert all(type(layer).__name__ == "DynamicLayer" for layer in first.cache.layers)
        turn = [[51, picture(7), 53], [54, picture(8), 55, 56]]
        inputs = next_turn(collate(batch), first, turn)
        second = generate(model, inputs, steps=3, past_key_values=first.cache)
    rows = [
        Row([*row.parts, *text, *new])
        for row, text, new in zip(batch, first.text.tolist(), turn, strict=True)
    ]
    cuts = [Cut(layer, evict(keep, by)) for layer, keep, by in STAGES]
    check(second, greedy(model, rows, cuts, steps=3))


@POSITIONS
def test_rows_of_a_cache_can_be_chosen_and_repeated(llava: Any, positions: str) -> None:
    model, inputs, chosen = llava(), collate(prompts()), [2, 2, 0, 0]
    rows = readers(model, positions)
    with tokenprune.attach(model, *specs(positions)):
        first = generate(model, inputs, steps=3)
        first.cache.batch_select_indices(torch.tensor([2, 0]))
        first.cache.batch_repeat_interleave(2)
        again = {k: v[chosen] for k, v in next_turn(inputs, first, TEXT).items()}
        second = generate(model, again, steps=3, past_key_values=first.cache)
    say(rows, 1)
    hear(rows, first, TEXT)
    text, logits = say(rows, 3)
    check(second, (text[chosen], logits[chosen]))


def test_cropping_goes_as_far_as_in_the_shortest_layer_or_nowhere(llava: Any) -> None:
    model, inputs = llava(), collate(prompts())
    with tokenprune.attach(model, *specs("original")):
        cache = generate(model, inputs).cache
        shapes = [layer.keys.shape for layer in cache.layers]
        with pytest.raises(UnsupportedError, match="cannot crop 40 tokens off a cache"):
            cache.crop(-40)
        assert [layer.keys.shape for layer in cache.layers] == shapes
        cache.crop(-5)
        assert {layer.get_seq_length() for layer in cache.layers} == {inputs["input_ids"].shape[1]}


def test_every_slot_after_the_images_can_be_cropped_and_not_one_more(llava: Any) -> None:
    model, steps = llava(), 6
    with tokenprune.attach(model, "uniform | evict(0) @ after-layer(1)"):
        cache = generate(model, collate(prompts()), steps=steps).cache
    length = cache.get_seq_length()
    tail = 3 + steps - 1  # the shortest text after a picture, and what was said
    with pytest.raises(UnsupportedError, match=f"crop {tail + 1} tokens .* shortened {tail} tok"):
        cache.crop(-tail - 1)
    cache.crop(-tail)
    assert {layer.get_seq_length() for layer in cache.layers} == {length - tail}


def test_another_attachment_cannot_continue_a_cache_with_other_layers(llava: Any) -> None:
    model, inputs = llava(), collate(prompts())
    with tokenprune.attach(model, *specs("original")):
        first = generate(model, inputs, steps=2)
    inputs = next_turn(inputs, first, TEXT)
    wrong = ["fastv | evict(4) @ after-layer(2)", "cls-attention | evict(4) @ before-llm"]
    for stage, after in zip(wrong, ("2", "no layer"), strict=True):
        with (
            tokenprune.attach(model, stage),
            pytest.raises(AttachError, match=f"reduced after layer 1.* reduces after {after}"),
        ):
            generate(model, inputs, past_key_values=first.cache)
    # Refused before anything was written, so the right attachment still can.
    rows = readers(model, "original")
    say(rows, 1)
    hear(rows, first, TEXT)
    wanted = say(rows, 3)
    with tokenprune.attach(model, *specs("original")):
        check(generate(model, inputs, steps=3, past_key_values=first.cache), wanted)


def test_a_cache_is_refused_by_the_detached_model_at_its_first_layer(llava: Any) -> None:
    model, inputs = llava(), collate(prompts())
    with tokenprune.attach(model, *specs("original")):
        first = generate(model, inputs, steps=2)
    shapes = [layer.keys.shape for layer in first.cache.layers]
    with pytest.raises(AttachError, match="attach again, or start a new cache"):
        generate(model, next_turn(inputs, first, TEXT), past_key_values=first.cache)
    assert [layer.keys.shape for layer in first.cache.layers] == shapes


def test_a_cache_given_by_the_caller_is_used(llava: Any) -> None:
    model, cache = llava(), DynamicCache()
    with tokenprune.attach(model, *specs("original")):
        answer = generate(model, collate(prompts()), steps=3, past_key_values=cache)
    assert answer.cache is cache
    check(answer, say(readers(model, "original"), 3))
