"""The KV cache of a compressed prompt: shorter inside, whole outside; turns, copies and crops."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import tokenprune
from support.flash import flash_attention
from support.llava import (
    PAD,
    PATCHES,
    Answer,
    Row,
    collate,
    generate,
    picture,
    prompts,
    pruned,
    spec,
)
from support.oracle import greedy_batch
from support.outputs import cache_of
from tokenprune import AttachError, UnsupportedError

from .conftest import MakeLlava

BOTH_POSITIONS = pytest.mark.parametrize("positions", ["reindexed", "original"])
TEXT = [[51, 52, 53], [54, 55, 56], [57, 58, 59]]
RAGGED = [[51, 52, 53], [54], [57, 58]]
WITH_IMAGES = [[51, picture(7), 53], [54], [55, picture(8), 56, 57]]


def continued(batch: list[Row], answer: Answer, turn: Sequence[Sequence[Any]]) -> list[Row]:
    """The prompts of a second turn."""
    rows = zip(batch, answer.text.tolist(), turn, strict=True)
    return [Row([*row.parts, *text, *new]) for row, text, new in rows]


def next_turn(
    before: dict[str, Tensor], answer: Answer, turn: Sequence[Sequence[Any]]
) -> dict[str, Tensor]:
    """What is passed to `generate`: all ids, all of the mask, but new pictures only.

    Where turns are of different lengths, padding comes in the middle.
    """
    new = collate([Row(list(each)) for each in turn])
    new["input_ids"] = torch.cat([before["input_ids"], answer.text, new["input_ids"]], 1)
    ones = torch.ones_like(answer.text)
    new["attention_mask"] = torch.cat([before["attention_mask"], ones, new["attention_mask"]], 1)
    return new


def check(answer: Answer, wanted: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(answer.text, wanted[0])
    torch.testing.assert_close(answer.logits, wanted[1], rtol=0, atol=1e-5)


@BOTH_POSITIONS
@pytest.mark.parametrize("turn", [TEXT, RAGGED, WITH_IMAGES], ids=["text", "ragged", "images"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_second_turn(
    llava: MakeLlava, positions: str, turn: list[list[Any]], attention: str
) -> None:
    model = llava(attention)
    with tokenprune.attach(model, spec(4, positions)):
        first = generate(model, collate(prompts()))
        inputs = next_turn(collate(prompts()), first, turn)
        second = generate(model, inputs, past_key_values=first.cache)
    batch = continued(prompts(), first, turn)
    check(second, greedy_batch(model, batch, 4, positions=positions))
    assert torch.equal(second.prompt, inputs["input_ids"])


@BOTH_POSITIONS
def test_a_second_turn_with_an_image_under_flash(llava: MakeLlava, positions: str) -> None:
    """One row without padding: gaps in its positions must not look like packed sequences."""
    model, batch, turn = llava(), prompts()[:1], WITH_IMAGES[:1]
    with flash_attention(model), tokenprune.attach(model, spec(4, positions)):
        first = generate(model, collate(batch))
        second = generate(
            model, next_turn(collate(batch), first, turn), past_key_values=first.cache
        )
    check(second, greedy_batch(model, continued(batch, first, turn), 4, positions=positions))


@BOTH_POSITIONS
def test_a_third_turn(llava: MakeLlava, positions: str) -> None:
    model, batch, inputs = llava(), prompts(), collate(prompts())
    with tokenprune.attach(model, spec(4, positions)):
        answer = generate(model, inputs)
        for turn in (WITH_IMAGES, TEXT):
            inputs, batch = next_turn(inputs, answer, turn), continued(batch, answer, turn)
            answer = generate(model, inputs, past_key_values=answer.cache)
    check(answer, greedy_batch(model, batch, 4, positions=positions))


@BOTH_POSITIONS
def test_a_copied_cache_goes_its_own_way(llava: MakeLlava, positions: str) -> None:
    model = llava()
    with tokenprune.attach(model, spec(4, positions)):
        first = generate(model, collate(prompts()))
        copied = copy.deepcopy(first.cache)
        answers = [
            generate(model, next_turn(collate(prompts()), first, turn), past_key_values=cache)
            for turn, cache in ((WITH_IMAGES, copied), (TEXT, first.cache))
        ]
    for turn, answer in zip((WITH_IMAGES, TEXT), answers, strict=True):
        check(
            answer,
            greedy_batch(model, continued(prompts(), first, turn), 4, positions=positions),
        )


@BOTH_POSITIONS
def test_a_vanilla_first_turn_can_be_continued_attached(llava: MakeLlava, positions: str) -> None:
    model, batch, turn = llava(), prompts()[:1], WITH_IMAGES[:1]
    first = generate(model, collate(batch, extra=2))
    inputs = next_turn(collate(batch), first, turn)
    inputs["input_ids"] = torch.cat([torch.full((1, 2), PAD), inputs["input_ids"]], 1)
    inputs["attention_mask"] = torch.cat([torch.zeros(1, 2).long(), inputs["attention_mask"]], 1)
    with tokenprune.attach(model, spec(4, positions)):
        second = generate(model, inputs, past_key_values=first.cache)
    row = continued(batch, first, turn)
    check(second, greedy_batch(model, row, (PATCHES, 4), positions=positions))


def test_a_cache_can_be_continued_by_another_attachment(llava: MakeLlava) -> None:
    """What was reduced is told by the cache; the attachment decides about new images only."""
    model, batch, turn = llava(), prompts()[:1], WITH_IMAGES[:1]
    first = pruned(model, collate(batch), 4)
    inputs = next_turn(collate(batch), first, turn)
    second = pruned(model, inputs, 9, past_key_values=first.cache)
    check(second, greedy_batch(model, continued(batch, first, turn), (4, 9)))


@BOTH_POSITIONS
def test_rows_of_a_cache_can_be_chosen_and_repeated(llava: MakeLlava, positions: str) -> None:
    model = llava()
    with tokenprune.attach(model, spec(4, positions)):
        first = generate(model, collate(prompts()))
        first.cache.batch_select_indices(torch.tensor([2, 0]))
        first.cache.batch_repeat_interleave(2)
        inputs = next_turn(collate(prompts()), first, TEXT)
        rows = [2, 2, 0, 0]
        second = generate(
            model, {k: v[rows] for k, v in inputs.items()}, past_key_values=first.cache
        )
    text, logits = greedy_batch(model, continued(prompts(), first, TEXT), 4, positions=positions)
    check(second, (text[rows], logits[rows]))


@BOTH_POSITIONS
def test_cropping_what_came_after_the_prompt(llava: MakeLlava, positions: str) -> None:
    model = llava()
    with tokenprune.attach(model, spec(4, positions)):
        first = generate(model, collate(prompts()))
        first.cache.crop(-4)
        again = generate(model, _asked_again(first, -3), past_key_values=first.cache, steps=3)
    check(again, (first.text[:, 3:], first.logits[:, 3:]))


def _asked_again(first: Answer, cut: int) -> dict[str, Tensor]:
    ids = torch.cat([first.prompt, first.text], 1)[:, :cut]
    ones = torch.ones_like(first.text[:, :cut])
    return {
        "input_ids": ids,
        "attention_mask": torch.cat([collate(prompts())["attention_mask"], ones], 1),
    }


def test_cropping_into_the_images_is_refused(llava: MakeLlava) -> None:
    cache = pruned(llava(), collate(prompts()), 4).cache
    # Five new tokens are cached. Of the prompt, the words that end all rows can go as well.
    length = cache.get_seq_length()
    with pytest.raises(UnsupportedError, match=r"cannot crop 40 tokens off a cache"):
        cache.crop(-40)
    cache.crop(-5)
    assert cache.get_seq_length() == length - 5
    cache.crop(-3)
    with pytest.raises(UnsupportedError, match="only what came after"):
        cache.crop(-(PATCHES - 4))  # one of them was dropped
    assert cache.get_seq_length() == length - 8


def test_key_value_lengths(llava: MakeLlava) -> None:
    """Padding is dropped together with visual tokens, so a text-only row costs nothing."""
    model, steps = llava(), 6
    answer = pruned(model, collate(prompts()), 4, steps=steps)
    widest = max(len(row.ids) - (PATCHES - 4) * len(row.images) for row in prompts())
    width = collate(prompts())["input_ids"].shape[1]
    assert len(answer.cache.layers) == 3
    for layer in answer.cache.layers:
        assert layer.keys.shape[-2] == layer.values.shape[-2] == widest + steps - 1
        assert layer.get_seq_length() == width + steps - 1
    assert answer.cache.get_seq_length() == width + steps - 1


def test_a_cache_given_by_the_caller_is_used(llava: MakeLlava) -> None:
    model = llava()
    cache = DynamicCache(config=model.config)
    answer = pruned(model, collate(prompts()), 4, past_key_values=cache)
    assert answer.cache is cache
    check(answer, greedy_batch(model, prompts(), 4))


def test_the_cache_of_an_attached_run_does_nothing_after_detach(llava: MakeLlava) -> None:
    model = llava()
    first = pruned(model, collate(prompts()), 4)
    inputs = next_turn(collate(prompts()), first, TEXT)
    with pytest.raises(AttachError, match="attach again, or start a new cache"):
        generate(model, inputs, past_key_values=first.cache)
    with tokenprune.attach(model, spec(4)):
        second = generate(model, inputs, past_key_values=first.cache)
    check(second, greedy_batch(model, continued(prompts(), first, TEXT), 4))


@torch.no_grad()
def test_the_cache_of_a_prefill_alone_is_refused_after_detach(llava: MakeLlava) -> None:
    model = llava()
    with tokenprune.attach(model, spec(4)):
        cache = cache_of(model(**collate(prompts()), use_cache=True))
    with pytest.raises(AttachError, match="attach again, or start a new cache"):
        model(input_ids=torch.tensor([[5], [6], [7]]), past_key_values=cache)


@BOTH_POSITIONS
def test_a_turn_of_one_word_is_read_together_with_the_latest(
    llava: MakeLlava, positions: str
) -> None:
    """Two queries behind a cache without padding, which are not causal by a flag."""
    model, batch = llava(), prompts()[:1]
    with tokenprune.attach(model, spec(4, positions)):
        first = generate(model, collate(batch))
        inputs = next_turn(collate(batch), first, [[51]])
        second = generate(model, inputs, past_key_values=first.cache)
    check(second, greedy_batch(model, continued(batch, first, [[51]]), 4, positions=positions))


def test_reset_is_refused(llava: MakeLlava) -> None:
    cache = pruned(llava(), collate(prompts()), 4).cache
    with pytest.raises(UnsupportedError, match="^cannot reset a cache .* make a new one$"):
        cache.reset()


def test_the_cache_of_a_text_only_batch_stays_stock(llava: MakeLlava) -> None:
    model, texts = llava(), [Row([1, 31, 32]), Row([1, 41, 42, 43])]
    first = pruned(model, collate(texts), 4)
    vanilla = generate(
        model, next_turn(collate(texts), first, TEXT[:2]), past_key_values=first.cache
    )
    check(vanilla, greedy_batch(model, continued(texts, first, TEXT[:2]), 4))
