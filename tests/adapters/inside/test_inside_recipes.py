"""Recipes for places inside the LLM are what their papers say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokenprune
from support.inside_oracle import Cut, evict, greedy
from support.llava import PATCHES, collate, generate, prompts
from tokenprune import AfterLayer, ClsAttentionScorer, Evict, FastVScorer, parse, parse_schedule


def test_the_papers_defaults() -> None:
    stage = parse("fastv")
    assert stage.strategy == tokenprune.Strategy(FastVScorer("last"), Evict(0.5))
    assert stage.placement == AfterLayer(2, "original")
    stage = parse("vtc-cls-in-llm")
    assert stage.strategy == tokenprune.Strategy(ClsAttentionScorer(3, "avg"), Evict(128))
    assert stage.placement == AfterLayer(2, "original")
    stage = parse("vtw")
    assert stage.strategy.steps[-1] == Evict(0)
    assert stage.placement == AfterLayer(15, "original")


def test_pyramiddrop_keeps_half_of_the_first_count_then_a_quarter_then_an_eighth() -> None:
    stages = parse_schedule("pyramiddrop")
    assert [stage.placement for stage in stages] == [
        AfterLayer(layers, "reindexed") for layers in (8, 16, 24)
    ]
    left = [576]
    for stage in stages:
        reducer = stage.strategy.steps[-1]
        assert isinstance(reducer, Evict)
        left.append(reducer.budget.count(left[-1]))
    assert left == [576] + [int(576 * share) for share in (0.5, 0.25, 0.125)]


@pytest.mark.parametrize(
    ("recipe", "cuts"),
    [
        ("fastv(4)", [Cut(2, evict(4))]),
        ("fastv(keep=0.25, layer=1, queries='text')", [Cut(1, evict(4, "text"))]),
        ("vtc-cls-in-llm(4)", [Cut(2, evict(4, "cls"))]),
        ("vtw(layer=1)", [Cut(1, evict(0))]),
        ("vtw(layer=2, positions='reindexed')", [Cut(2, evict(0), "reindexed")]),
        (
            "pyramiddrop(first=1, second=2)",
            [Cut(1, evict(PATCHES // 2), "reindexed"), Cut(2, evict(PATCHES // 4), "reindexed")],
        ),
        (
            "pyramiddrop(0.25, 1, 2, positions='original', queries='text')",
            [Cut(1, evict(PATCHES // 4, "text")), Cut(2, evict(1, "text"))],
        ),
    ],
)
def test_recipes_at_work(llava: Any, recipe: str, cuts: list[Cut]) -> None:
    model = llava()
    text, logits = greedy(model, prompts(), cuts, steps=3)
    with tokenprune.attach(model, recipe):
        answer = generate(model, collate(prompts()), steps=3)
    assert torch.equal(answer.text, text)
    torch.testing.assert_close(answer.logits, logits, rtol=0, atol=1e-5)


def test_in_the_llm_the_set_is_that_of_before_the_llm_the_answer_is_not(llava: Any) -> None:
    """VTC-CLS, table 6: selection does not depend on the text, but two layers saw every token."""
    model, inputs = llava(), collate(prompts())
    found = []
    for recipe in ("vtc-cls-in-llm(4, layer=1)", "vtc-cls(4)"):
        with tokenprune.attach(model, recipe) as attachment:
            found.append((generate(model, inputs, steps=1).logits, attachment.last.plan.anchors))
    (inside, kept), (before, also_kept) = found
    assert torch.equal(kept, also_kept)
    assert (inside - before)[:2].abs().amax(-1).min() > 0.05
