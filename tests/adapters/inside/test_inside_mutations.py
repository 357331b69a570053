"""The oracle tests can fail: each plausible bug, put in on purpose, is caught by one of them.

With one row, no padding and one turn, most of these change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

import tokenprune
from support.inside_oracle import Cut, Look, Recompute, evict, greedy, say
from support.llava import BOS, Row, collate, generate, picture, prompts
from tokenprune import Signals
from tokenprune_adapters.hf.attention import Asked
from tokenprune_adapters.hf.llm import (
    inner_stages,
    layer_hooks,
    segment,
    short_prompt,
    signal_cache,
    text_attention,
)
from tokenprune_adapters.hf.llm.cache_layers import ShortenedDynamicLayer
from tokenprune_adapters.hf.llm.image_slots import Images, Seats
from tokenprune_adapters.hf.llm.text_attention import Prompts
from tokenprune_adapters.kit import prompt_layout

Error: TypeAlias = Callable[[Any], float]
"""How far an attached model is from the oracle; infinite where the text differs."""

Patch: TypeAlias = pytest.MonkeyPatch

FASTV = "fastv | evict(4) @ after-layer(2, positions={!r})"
BEFORE = "cls-attention | evict(10) @ before-llm"


def batch(positions: str, before: int | None = None, rows: list[Row] | None = None) -> Error:
    """The oracle test: three ragged rows, left padded."""

    def error(model: Any) -> float:
        cuts = [Cut(2, evict(4), positions)]
        wanted = greedy(model, rows or prompts(), cuts, 4, before=before)
        stages = [FASTV.format(positions), *([BEFORE] if before else [])]
        with tokenprune.attach(model, *stages):
            return _distance(generate(model, collate(rows or prompts()), steps=4), wanted)

    return error


def text_queries(model: Any) -> float:
    """A short question beside a long one."""
    rows = [Row([BOS, picture(1), 5]), Row([BOS, picture(2), *range(10, 50)])]
    wanted = greedy(model, rows, [Cut(1, evict(2, "text"))], 3, before=4)
    stages = ["fastv(queries='text') | evict(2) @ after-layer(1)", BEFORE.replace("10", "4")]
    with tokenprune.attach(model, *stages):
        return _distance(generate(model, collate(rows), steps=3), wanted)


def two_stages(model: Any) -> float:
    """[CLS] scores, twice."""
    cuts = [Cut(1, evict(9, "cls"), "reindexed"), Cut(2, evict(4, "cls"), "reindexed")]
    wanted = greedy(model, prompts(), cuts, 4)
    stages = [
        f"cls-attention | evict({cut}) @ after-layer({layer}, positions='reindexed')"
        for layer, cut in ((1, 9), (2, 4))
    ]
    with tokenprune.attach(model, *stages):
        return _distance(generate(model, collate(prompts()), steps=4), wanted)


def second_turn(positions: str) -> Error:
    """The batch, continued with one more image each."""

    def error(model: Any) -> float:
        turn = [[51, picture(7), 52], [53, 54, picture(8), 55], [picture(9), 55, 56]]
        rows = [Recompute(model, row, [Cut(2, evict(4), positions)]) for row in prompts()]
        first = say(rows, 2)[0]
        for row, said, new in zip(rows, first.tolist(), turn, strict=True):
            row.extend([*said, *new])
        wanted = say(rows, 3)
        new = collate([Row(list(each)) for each in turn])
        with tokenprune.attach(model, FASTV.format(positions)):
            answer = generate(model, collate(prompts()), steps=2)
            ids = [answer.prompt, answer.text, new["input_ids"]]
            ones = torch.ones_like(answer.text)
            mask = [collate(prompts())["attention_mask"], ones, new["attention_mask"]]
            new |= {"input_ids": torch.cat(ids, 1), "attention_mask": torch.cat(mask, 1)}
            return _distance(generate(model, new, steps=3, past_key_values=answer.cache), wanted)

    return error


def scores(model: Any) -> float:
    """What tokens are ranked by, in rows with much padding."""
    wanted: list[Tensor] = []

    def decide(look: Look) -> Tensor:
        wanted.append(look.last)
        return evict(4)(look)

    for row in prompts():
        Recompute(model, row, [Cut(2, decide)]).logits([])
    with tokenprune.attach(model, FASTV.format("original")) as attachment:
        generate(model, collate(prompts(), extra=9), steps=1)
    got = attachment.last.scores
    assert got is not None
    return float(((got - torch.stack(wanted)) / torch.stack(wanted)).abs().max())


def beams(model: Any) -> float:
    """Rows of the cache change places, in every layer."""
    row = [prompts()[1]]
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 5, "eos_token_id": None}
    options |= {"do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    recompute = Recompute(model, row[0], [Cut(2, evict(4))])
    recompute.logits([])
    with tokenprune.attach(model, FASTV.format("original")):
        out = model.generate(**collate(row), **options)
    text = out.sequences[0, -5:].tolist()
    each = [recompute.logits(text[:n]).log_softmax(-1)[token] for n, token in enumerate(text)]
    return float((torch.stack(each).mean() - out.sequences_scores[0]).abs())


def chosen_rows(model: Any) -> float:
    """Unequal rows of a cache in another order."""
    order = torch.tensor([2, 0, 1])
    text, logits = greedy(model, prompts(), [Cut(2, evict(4), "reindexed")], 4)
    with tokenprune.attach(model, FASTV.format("reindexed")):
        first = generate(model, collate(prompts()), steps=3)
        first.cache.batch_select_indices(order)
        ones = torch.ones_like(first.text)
        again = {
            "input_ids": torch.cat([first.prompt, first.text], 1)[order],
            "attention_mask": torch.cat([collate(prompts())["attention_mask"], ones], 1)[order],
        }
        second = generate(model, again, steps=1, past_key_values=first.cache)
    return _distance(second, (text[order, 3:], logits[order, 3:]))


def _distance(answer: Any, wanted: tuple[Tensor, Tensor]) -> float:
    if answer.logits.isnan().any():
        return torch.nan
    if not torch.equal(answer.text, wanted[0]):
        return torch.inf
    return float((answer.logits - wanted[1]).abs().max())


# --------------------------------------------------------------------------------- the bugs


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


def _edit_late(patch: Patch, change: Callable[[Any, dict[str, Any], dict[str, Any]], Any]) -> None:
    """Change what the layers of late segments are called with: `change(run, was, now)`."""

    def before(self: Any, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        run, was = kwargs.get(short_prompt.RUN), dict(kwargs)
        args, kwargs = original(self, layer, args, kwargs)
        if run is not None and run.start_of(self.number) > 0:
            kwargs = kwargs | change(run, was, kwargs)
        return args, kwargs

    original = layer_hooks.BeforeLayer.before
    patch.setattr(layer_hooks.BeforeLayer, "before", before)


def decode_position_not_shifted(patch: Patch) -> None:
    _edit_states(patch, moved=lambda state: None)


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


def one_mask_for_all_layers(patch: Patch) -> None:
    _edit_late(patch, lambda run, was, now: {"attention_mask": was["attention_mask"]})


def late_layers_without_padding(patch: Patch) -> None:
    def mask(run: Any, was: Any, now: Any) -> Any:
        own = now["attention_mask"]
        if own is None:
            return {}
        batch, _, queries, keys = own.shape
        late = prompt_layout.causal_mask(None, batch, queries, keys, "sdpa", own)
        return {"attention_mask": late}

    _edit_late(patch, mask)


def _positions(patch: Patch, wrong: str) -> None:
    def enter(slots: Any, before: Any, whole: Any, positions: str, *rest: Any) -> Any:
        return original(slots, before, whole, wrong, *rest)

    original = segment.enter
    patch.setattr(inner_stages, "enter", enter)


def renumbered_positions(patch: Patch) -> None:
    _positions(patch, "reindexed")


def positions_not_renumbered(patch: Patch) -> None:
    _positions(patch, "original")


def rotary_embedding_of_other_slots(patch: Patch) -> None:
    """The newest of the first segment's cosines, not those of the kept slots."""

    def cut(run: Any, was: Any, now: Any) -> Any:
        slots = now["position_embeddings"][0].shape[1]
        first = tuple(part[:, -slots:] for part in was["position_embeddings"])
        return {"position_embeddings": first}

    _edit_late(patch, cut)


def _edit_rows(patch: Patch, change: Callable[..., Tensor]) -> None:
    """Change the attention rows of decoder layers: `change(original, asked, queries, visible)`."""
    original = Asked.rows
    patch.setattr(Asked, "rows", lambda *args: change(original, *args))


def least_attended(patch: Patch) -> None:
    _edit_rows(patch, lambda rows, *args: -rows(*args))


def padding_in_the_score_row(patch: Patch) -> None:
    """Padding hidden neither by what is known of the prompts, nor by the kernel's mask."""
    original = Prompts.visible
    patch.setattr(
        Prompts, "visible", lambda self, *args: original(replace(self, valid=None), *args)
    )
    _edit_rows(patch, lambda rows, asked, *args: rows(replace(asked, mask=None), *args))


def score_row_of_unscaled_products(patch: Patch) -> None:
    _edit_rows(patch, lambda rows, asked, *args: rows(replace(asked, scale=1.0), *args))


def score_row_without_rotary_embedding(patch: Patch) -> None:
    """Every query as if it stood at its prompt's end: another rotation than the model's."""

    def change(rows: Any, asked: Asked, *rest: Any) -> Tensor:
        half = asked.query.shape[-1] // 2
        turned = torch.cat([-asked.query[..., half:], asked.query[..., :half]], dim=-1)
        return rows(replace(asked, query=turned), *rest)

    _edit_rows(patch, change)


def ranking_of_the_first_row_for_all(patch: Patch) -> None:
    """As the released FastV does."""
    _edit_rows(patch, lambda rows, *args: rows(*args)[:1].expand(len(args[1]), -1, -1, -1))


def second_to_last_query(patch: Patch) -> None:
    _edit_rows(
        patch, lambda rows, asked, queries, visible: rows(asked, (queries - 1).clamp(0), visible)
    )


def heads_in_the_wrong_groups(patch: Patch) -> None:
    """Query heads of the first key head asked of the second."""
    _edit_rows(patch, lambda rows, asked, *args: rows(replace(asked, key=asked.key.flip(1)), *args))


def rows_of_the_wrong_layer(patch: Patch) -> None:
    original = inner_stages.ReduceInside._layers

    def earlier(self: Any, signal: Any, start: int) -> tuple[int, ...]:
        return tuple(max(layer - 1, 0) for layer in original(self, signal, start))

    patch.setattr(inner_stages.ReduceInside, "_layers", earlier)


def columns_of_another_image(patch: Patch) -> None:
    patch.setattr(Seats, "column", property(lambda seats: (seats.index + 1) % seats.slots))


def rows_of_another_prompt(patch: Patch) -> None:
    """Every image is taken to be in the first prompt."""
    patch.setattr(Seats, "row", property(lambda seats: torch.zeros_like(seats.index[:, 0])))


def padding_asks_too(patch: Patch) -> None:
    """Fillers among the text queries count."""

    def of(keep: Tensor) -> Any:
        made = original(keep)
        return replace(made, valid=None)

    original = prompt_layout.PromptLayout.of

    class Everything:
        of = staticmethod(original)

    Everything.of = staticmethod(of)
    patch.setattr(text_attention, "PromptLayout", Everything)


def fillers_keep_minus_infinity(patch: Patch) -> None:
    def shorten_(self: Any, x: Tensor) -> Tensor:
        take = prompt_layout.gather_rows
        return take(x, self.index) if x.is_floating_point() else original(self, x)

    original = prompt_layout.PromptLayout.shorten
    patch.setattr(prompt_layout.PromptLayout, "shorten", shorten_)


def first_scores_of_the_raster(patch: Patch) -> None:
    """A second stage reads the tower's signals as if nothing had gone."""

    def decide(self: Any, run: Any, *rest: Any) -> Any:
        before = run.known
        reduction = original(self, run, *rest)
        run.known = before if before else signal_cache.SignalCache.get(self.store, rest[0].prints)
        return reduction

    original = inner_stages.ReduceInside._decide
    patch.setattr(inner_stages.ReduceInside, "_decide", decide)


def signals_in_another_order(patch: Patch) -> None:
    """The latest image first, as if signals came in the order of the batch by luck."""

    def get(self: Any, prints: list[int], device: torch.device) -> Signals:
        return original(self, prints[::-1], device)

    original = signal_cache.SignalCache.get
    patch.setattr(signal_cache.SignalCache, "get", get)


def images_not_followed(patch: Patch) -> None:
    """A second stage looks for visual tokens where they were."""
    patch.setattr(
        Images,
        "through",
        lambda self, layout: replace(
            self,
            image=self.image[:, -layout.index.shape[1] :],
            patch=self.patch[:, -layout.index.shape[1] :],
        ),
    )


def earlier_segments_forgotten(patch: Patch) -> None:
    """What earlier stages moved in this pass is not counted for later layers."""

    def _segment(self: Any, run: Any, start: int, previous: Any, drop: Any) -> Any:
        made = original(self, run, start, previous, drop)
        return replace(made, after=replace(made.after, moved=None))

    original = inner_stages.ReduceInside._segment
    patch.setattr(inner_stages.ReduceInside, "_segment", _segment)


def selected_again_at_decode(patch: Patch) -> None:
    """Late segments of a decode step get the validity of the early ones."""

    def before(self: Any, llm: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        result = original(self, llm, args, kwargs)
        run = kwargs.get(short_prompt.RUN)
        if run is not None and run.images is None and len(run.segments) > 1:
            valid = run.segments[0].after.valid
            late = run.segments[2]
            if valid is not None and late.after.valid is not None:
                keys = late.after.valid.shape[1]
                mask = prompt_layout.causal_mask(
                    valid[:, -keys:], 3, 1, keys, "sdpa", late.positions
                )
                run.segments[2] = replace(late, mask=mask)
        return result

    original = short_prompt.ShortenPrompts.before
    patch.setattr(short_prompt.ShortenPrompts, "before", before)


def rows_of_late_layers_not_reordered(patch: Patch) -> None:
    patch.setattr(ShortenedDynamicLayer, "reorder_cache", lambda self, rows: None)


def states_of_chosen_rows_forgotten(patch: Patch) -> None:
    patch.setattr(ShortenedDynamicLayer, "batch_select_indices", DynamicLayer.batch_select_indices)


ORIGINAL, REINDEXED = batch("original"), batch("reindexed")
BOTH_PLACES = batch("original", 10)
TURN_ORIGINAL, TURN_REINDEXED = second_turn("original"), second_turn("reindexed")

CAUGHT: dict[Callable[[Patch], None], list[Error]] = {
    decode_position_not_shifted: [REINDEXED, TURN_REINDEXED],
    physical_sequence_length: [BOTH_PLACES],
    columns_of_the_users_mask: [BOTH_PLACES],
    one_mask_for_all_layers: [ORIGINAL, REINDEXED],
    late_layers_without_padding: [ORIGINAL, REINDEXED, TURN_ORIGINAL],
    renumbered_positions: [ORIGINAL, TURN_ORIGINAL],
    positions_not_renumbered: [REINDEXED, TURN_REINDEXED],
    rotary_embedding_of_other_slots: [ORIGINAL],
    least_attended: [ORIGINAL, REINDEXED, TURN_ORIGINAL],
    padding_in_the_score_row: [scores],
    score_row_without_rotary_embedding: [ORIGINAL],
    score_row_of_unscaled_products: [ORIGINAL],
    ranking_of_the_first_row_for_all: [ORIGINAL],
    second_to_last_query: [ORIGINAL],
    heads_in_the_wrong_groups: [ORIGINAL],
    rows_of_the_wrong_layer: [ORIGINAL],
    columns_of_another_image: [ORIGINAL],
    rows_of_another_prompt: [ORIGINAL],
    padding_asks_too: [text_queries],
    fillers_keep_minus_infinity: [BOTH_PLACES],
    first_scores_of_the_raster: [two_stages],
    signals_in_another_order: [two_stages],
    images_not_followed: [two_stages],
    earlier_segments_forgotten: [two_stages],
    selected_again_at_decode: [ORIGINAL],
    rows_of_late_layers_not_reordered: [beams],
    states_of_chosen_rows_forgotten: [chosen_rows],
}

# These fail by an exception. For all others, one would show that the mutation itself is broken.
LOUD: dict[Callable[[Patch], None], type[Exception]] = {
    physical_sequence_length: tokenprune.UnsupportedError,
    one_mask_for_all_layers: RuntimeError,
    padding_asks_too: tokenprune.ScoreError,
    fillers_keep_minus_infinity: tokenprune.ScoreError,
}

NAMES = {
    ORIGINAL: "original",
    REINDEXED: "reindexed",
    BOTH_PLACES: "both-places",
    TURN_ORIGINAL: "turn-original",
    TURN_REINDEXED: "turn-reindexed",
}


def _named(value: Any) -> str:
    return NAMES.get(value) or str(value.__name__)


@pytest.mark.parametrize(
    ("mutation", "error"),
    [(mutation, error) for mutation, errors in CAUGHT.items() for error in errors],
    ids=_named,
)
def test_a_bug_is_caught(
    llava: Any, monkeypatch: Patch, mutation: Callable[[Patch], None], error: Error
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
    [*NAMES, text_queries, two_stages, scores, beams, chosen_rows],
    ids=_named,
)
def test_without_a_bug_nothing_is_caught(llava: Any, error: Error) -> None:
    assert error(llava()) < 1e-5
