"""Batches, beams, turns and static caches of every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokenprune
from support.families import FAMILIES, SPECIAL, Row, Tiny, collate, of_tiles

EVERY = pytest.mark.parametrize("tiny", FAMILIES, ids=lambda tiny: tiny.name)
BEFORE = "uniform | evict(5) @ before-llm(positions='original')"
AFTER = "uniform | evict(4) @ after-layer(2)"


def said(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": SPECIAL} | options
    return model.generate(**inputs, **options)


def alone(tiny: Tiny, number: int) -> dict[str, Any]:
    """One prompt of the family's, without padding."""
    return collate(tiny, [tiny.rows[number]])


@EVERY
@pytest.mark.parametrize("spec", ["random | evict(5)", "random | evict(4) @ after-layer(2)"])
def test_a_prompt_is_pruned_the_same_alone_and_in_a_batch(tiny: Tiny, spec: str) -> None:
    """Random scores are of the picture, whatever it is batched with."""
    model, inputs = tiny.make("sdpa"), collate(tiny, tiny.rows)
    with torch.no_grad(), tokenprune.attach(model, of_tiles(tiny, spec)):
        batch = model(**inputs).logits
        for number in range(2):
            # Positions of the text are counted by the model, from the mask or not.
            given = alone(tiny, number)
            slots = given["input_ids"].shape[1]
            if not tiny.planes:
                first = inputs["input_ids"].shape[1] - slots
                given["position_ids"] = torch.arange(first, first + slots)[None]
            got = model(**given).logits[0]
            torch.testing.assert_close(got, batch[number, -slots:], atol=2e-4, rtol=0)


@EVERY
@pytest.mark.parametrize("spec", [BEFORE, AFTER, f"{BEFORE}; {AFTER}"])
def test_beams_and_static_caches_give_the_tokens_of_no_cache(tiny: Tiny, spec: str) -> None:
    model, inputs = tiny.make("sdpa"), collate(tiny, tiny.rows)
    with torch.no_grad(), tokenprune.attach(model, of_tiles(tiny, spec)):
        for beams in (1, 3):
            wanted = said(model, inputs, num_beams=beams, use_cache=False)
            assert torch.equal(said(model, inputs, num_beams=beams), wanted)
            static = {"cache_implementation": "static", "disable_compile": True}
            assert torch.equal(said(model, inputs, num_beams=beams, **static), wanted)


@EVERY
def test_a_second_turn_goes_on_from_the_cache(tiny: Tiny) -> None:
    model = tiny.make("sdpa")
    first = alone(tiny, 0)
    whole = collate(tiny, [Row([*tiny.rows[0].parts, 31, 32, 33])])
    with torch.no_grad(), tokenprune.attach(model, of_tiles(tiny, f"{BEFORE}; {AFTER}")):
        out = model(**first, use_cache=True)
        more = {"input_ids": whole["input_ids"][:, -3:], "attention_mask": whole["attention_mask"]}
        if tiny.planes:  # which the model counts for whole prompts alone
            last = out.logits.shape[1] + model.model.rope_deltas
            more["position_ids"] = (last + torch.arange(3)).expand(3, 1, 3)
        cache = out["cache" if "cache" in out else "past_key_values"]
        second = model(**more, past_key_values=cache, use_cache=True).logits
        wanted = model(**whole, use_cache=False).logits[:, -3:]
    torch.testing.assert_close(second, wanted, atol=1e-4, rtol=0)


@EVERY
def test_reports_count_pictures_and_videos(tiny: Tiny) -> None:
    model, inputs = tiny.make("sdpa"), collate(tiny, tiny.rows)
    kinds = [part[0] for row in tiny.rows for part in row.parts if isinstance(part, tuple)]
    for spec in (BEFORE, AFTER):
        with torch.no_grad(), tokenprune.attach(model, of_tiles(tiny, spec)) as attachment:
            model(**inputs)
        kept = attachment.report.kept
        assert {each.kind for each in kept} == set(kinds)
        assert sum(map(len, kept)) == attachment.report.tokens_after
