"""The oracle tests can fail: each plausible bug, put in on purpose, is caught by one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import tokenprune
from support.flash import flash_attention
from support.llava import Row, collate, generate, picture, prompts, pruned, spec
from support.oracle import compressed_embeddings, greedy_batch, hidden_states, loss
from tokenprune_adapters.hf import encoder_tower
from tokenprune_adapters.hf.llm import layer_hooks, segment, short_prompt
from tokenprune_adapters.hf.llm.cache_layers import ShortenedDynamicLayer
from tokenprune_adapters.kit import prompt_layout, tower_reading

from .conftest import MakeLlava

Error: TypeAlias = Callable[[Any], float]
"""How far an attached model is from an oracle; infinite where the text differs."""

Patch: TypeAlias = pytest.MonkeyPatch


def batch(positions: str) -> Error:
    """The oracle test: three ragged rows, left padded."""

    def error(model: Any) -> float:
        wanted = greedy_batch(model, prompts(), 4, positions=positions)
        return _distance(pruned(model, collate(prompts()), 4, positions), wanted)

    return error


def second_turn(model: Any) -> float:
    """The batch, continued with one more image each."""
    turn = [[51, picture(7), 52], [53, 54, picture(8)], [picture(9), 55, 56]]
    new = collate([Row(list(each)) for each in turn])
    with tokenprune.attach(model, spec(4)):
        first = generate(model, collate(prompts()))
        ids = [first.prompt, first.text, new["input_ids"]]
        ones = torch.ones_like(first.text)
        mask = [collate(prompts())["attention_mask"], ones, new["attention_mask"]]
        new |= {"input_ids": torch.cat(ids, 1), "attention_mask": torch.cat(mask, 1)}
        second = generate(model, new, past_key_values=first.cache)
    rows = zip(prompts(), first.text.tolist(), turn, strict=True)
    again = [Row([*row.parts, *text, *more]) for row, text, more in rows]
    return _distance(second, greedy_batch(model, again, 4))


@torch.no_grad()
def without_cache(model: Any) -> float:
    """One prompt without padding, positions with gaps."""
    with tokenprune.attach(model, spec(4, "original")):
        got = model(**collate(prompts()[1:2]), use_cache=False).logits[0, -1]
    embeds, places = compressed_embeddings(model, prompts()[1], 4, "original")
    return float((got - model.lm_head(hidden_states(model, embeds, places)[-1][0, -1])).abs().max())


@torch.no_grad()
def labels(model: Any) -> float:
    with tokenprune.attach(model, spec(4)):
        got = model(**collate(prompts(), labels=True)).loss
    return float((got - loss(model, prompts(), 4, "reindexed")).abs())


def flash(model: Any) -> float:
    """One row under flash attention, which looks at gaps in positions."""
    wanted = greedy_batch(model, prompts()[:1], 4, positions="original")
    with flash_attention(model):
        return _distance(pruned(model, collate(prompts()[:1]), 4, "original"), wanted)


def selected_rows(model: Any) -> float:
    """The cache's rows in another order."""
    order = torch.tensor([2, 0, 1])
    text, logits = greedy_batch(model, prompts(), 4)
    with tokenprune.attach(model, spec(4)):
        first = generate(model, collate(prompts()), steps=4)
        first.cache.batch_select_indices(order)
        ones = torch.ones_like(first.text)
        again = {
            "input_ids": torch.cat([first.prompt, first.text], 1)[order],
            "attention_mask": torch.cat([collate(prompts())["attention_mask"], ones], 1)[order],
        }
        second = generate(model, again, steps=2, past_key_values=first.cache)
    return _distance(second, (text[order, 4:], logits[order, 4:]))


def _distance(answer: Any, wanted: tuple[Tensor, Tensor]) -> float:
    if answer.logits.isnan().any():
        return torch.nan
    if not torch.equal(answer.text, wanted[0]):
        return torch.inf
    return float((answer.logits - wanted[1]).abs().max())


def _edit_states(patch: Patch, **changes: Callable[[Any], Any]) -> None:
    """Change what the cache is told."""

    def note(cache: Any, states: dict[int, Any]) -> None:
        edited = {
            start: replace(state, **{name: change(state) for name, change in changes.items()})
            for start, state in states.items()
        }
        original(cache, edited)

    original = short_prompt.note
    patch.setattr(short_prompt, "note", note)


def decode_position_not_shifted(patch: Patch) -> None:
    _edit_states(patch, moved=lambda state: None)


def prompt_position_not_shifted(patch: Patch) -> None:
    def enter(slots: Any, before: Any, whole: Any, positions: str, *rest: Any) -> Any:
        return original(slots, before, whole, "original", *rest)

    original = segment.enter
    patch.setattr(short_prompt, "enter", enter)


def positions_shifted_where_they_should_not(patch: Patch) -> None:
    def enter(slots: Any, before: Any, whole: Any, positions: str, *rest: Any) -> Any:
        return original(slots, before, whole, "reindexed", *rest)

    original = segment.enter
    patch.setattr(short_prompt, "enter", enter)


def physical_sequence_length(patch: Patch) -> None:
    patch.setattr(ShortenedDynamicLayer, "get_seq_length", DynamicLayer.get_seq_length)


def columns_of_the_users_mask(patch: Patch) -> None:
    """The newest columns of the caller's mask, instead of what is in the slots."""

    def before(self: Any, llm: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        result = original(self, llm, args, kwargs)
        own = kwargs.get("attention_mask")
        if mask is not None and own is not None and own.ndim == 4:
            batch, _, queries, keys = own.shape
            kwargs["attention_mask"] = prompt_layout.causal_mask(
                mask[:, -keys:].bool(), batch, queries, keys, "sdpa", own
            )
        return result

    original = short_prompt.ShortenPrompts.before
    patch.setattr(short_prompt.ShortenPrompts, "before", before)


def no_mask_at_all(patch: Patch) -> None:
    patch.setattr(segment, "_mask", lambda *args: None)


def fillers_forgotten_at_decode(patch: Patch) -> None:
    _edit_states(patch, valid=lambda state: None)


def fillers_keep_minus_infinity(patch: Patch) -> None:
    take = prompt_layout.gather_rows
    patch.setattr(prompt_layout.PromptLayout, "shorten", lambda self, x: take(x, self.index))


def positions_from_the_wrong_slots(patch: Patch) -> None:
    """Dropped slots show the token after them instead of the one before."""

    def restore(self: Any, x: Tensor) -> Tensor:
        return prompt_layout.gather_rows(x, (self.back + 1).clamp(max=x.shape[1] - 1))

    patch.setattr(prompt_layout.PromptLayout, "restore", restore)


def no_mask_over_gaps(patch: Patch) -> None:
    def enter(slots: Any, before: Any, whole: Any, *rest: Any) -> Any:
        return segment.enter(slots, before, replace(whole, cache=DynamicCache()), *rest)

    patch.setattr(short_prompt, "enter", enter)


def flash_sees_position_ids(patch: Patch) -> None:
    def before(self: Any, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        places = kwargs.get("position_ids")
        args, kwargs = hook(self, layer, args, kwargs)
        return args, kwargs | {"position_ids": places}

    hook = layer_hooks.BeforeLayer.before
    patch.setattr(layer_hooks.BeforeLayer, "before", before)


def rows_of_the_cache_mixed_up(patch: Patch) -> None:
    patch.setattr(ShortenedDynamicLayer, "batch_select_indices", DynamicLayer.batch_select_indices)


def least_attended(patch: Patch) -> None:
    _edit_rows(patch, lambda row: -row)


def cls_column_not_skipped(patch: Patch) -> None:
    """Every score goes to the patch after the one that it belongs to."""
    _edit_rows(patch, lambda row: row.roll(1, dims=-1))


def _edit_rows(patch: Patch, change: Callable[[Tensor], Tensor]) -> None:
    attention = tower_reading.attention
    patch.setattr(tower_reading, "attention", lambda *args: change(attention(*args)))


def first_patch_taken_for_cls(patch: Patch) -> None:
    """As `attentions[:, :, 0]` does in a tower without [CLS]."""

    def query(self: Any, projection: Any, args: Any, output: Tensor) -> None:
        hook(self, projection, args, output[:, 1:2])

    hook = encoder_tower._LayerTap.query
    patch.setattr(encoder_tower._LayerTap, "query", query)


def layers_up_to_the_end_of_the_tower(patch: Patch) -> None:
    def resolve(layers: Any, feature_layer: int, count: int) -> tuple[int, ...]:
        return resolve_layers(layers, count - 1, count)

    resolve_layers = tower_reading.resolve_layers
    patch.setattr(tower_reading, "resolve_layers", resolve)


def heads_torn_apart(patch: Patch) -> None:
    """Channels of one head taken for one channel of every head."""

    attention = tower_reading.attention
    patch.setattr(tower_reading, "attention", lambda *args: attention(*map(_torn, args)))


def _torn(x: Tensor) -> Tensor:
    """`(batch, heads, tokens, channels)`, its heads made of the wrong channels."""
    batch, heads, tokens, channels = x.shape
    flat = x.transpose(1, 2).reshape(batch, tokens, channels, heads)
    return flat.permute(0, 3, 1, 2)


REINDEXED, ORIGINAL = batch("reindexed"), batch("original")

CAUGHT: dict[Callable[[Patch], None], list[Error]] = {
    decode_position_not_shifted: [REINDEXED, second_turn],
    prompt_position_not_shifted: [REINDEXED, second_turn, labels],
    positions_shifted_where_they_should_not: [ORIGINAL, without_cache],
    physical_sequence_length: [REINDEXED, ORIGINAL, second_turn],
    columns_of_the_users_mask: [REINDEXED, ORIGINAL],
    no_mask_at_all: [REINDEXED, ORIGINAL, second_turn, labels],
    fillers_forgotten_at_decode: [REINDEXED, ORIGINAL, second_turn],
    fillers_keep_minus_infinity: [REINDEXED, ORIGINAL, second_turn, labels],
    positions_from_the_wrong_slots: [labels],
    no_mask_over_gaps: [without_cache],
    flash_sees_position_ids: [flash],
    rows_of_the_cache_mixed_up: [selected_rows],
    least_attended: [REINDEXED, ORIGINAL, second_turn, labels],
    cls_column_not_skipped: [REINDEXED, ORIGINAL],
    first_patch_taken_for_cls: [REINDEXED, ORIGINAL],
    layers_up_to_the_end_of_the_tower: [REINDEXED, ORIGINAL],
    heads_torn_apart: [REINDEXED, ORIGINAL],
}

# These fail by an exception. For all others, one would show that the mutation itself is broken.
LOUD: dict[Callable[[Patch], None], type[Exception]] = {
    physical_sequence_length: tokenprune.UnsupportedError,
    flash_sees_position_ids: AssertionError,
}


def _named(value: Any) -> str:
    if value in (REINDEXED, ORIGINAL):
        return "reindexed" if value is REINDEXED else "original"
    return str(value.__name__)


@pytest.mark.parametrize(
    ("mutation", "error"),
    [(mutation, error) for mutation, errors in CAUGHT.items() for error in errors],
    ids=_named,
)
def test_a_bug_is_caught(
    llava: MakeLlava,
    monkeypatch: Patch,
    mutation: Callable[[Patch], None],
    error: Error,
) -> None:
    mutation(monkeypatch)
    if mutation in LOUD:
        with pytest.raises(LOUD[mutation]):
            error(llava())
        return
    found = error(llava())
    assert not found < 1e-3, f"missed: the error is {found:.1e}"


@pytest.mark.parametrize(
    "error",
    [REINDEXED, ORIGINAL, second_turn, without_cache, labels, flash, selected_rows],
    ids=_named,
)
def test_without_a_bug_nothing_is_caught(llava: MakeLlava, error: Error) -> None:
    assert error(llava()) < 1e-5
