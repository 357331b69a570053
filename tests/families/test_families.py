"""Every family against the plain model that is told by hand what is dropped."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokenprune
from support.families import FAMILIES, IMAGE, SPECIAL, VIDEO, Tiny, collate, of_tiles
from support.family_oracle import Cut, expected

SPECS = {
    "before": (
        "uniform | evict(5) @ before-llm(positions='original')",
        [Cut("uniform | evict(5)")],
    ),
    "after 1": ("uniform | evict(5) @ after-layer(1)", [Cut("uniform | evict(5)", 1)]),
    "after 3": ("uniform | evict(5) @ after-layer(3)", [Cut("uniform | evict(5)", 3)]),
    "merge before": ("tome(5) @ before-llm(positions='original')", [Cut("tome(5)")]),
    "merge after": ("tome(5) @ after-layer(1)", [Cut("tome(5)", 1)]),
    "fastv": ("fastv | evict(4) @ after-layer(2)", [Cut("fastv | evict(4)", 2)]),
    "both": (
        "uniform | evict(6) @ before-llm(positions='original'); fastv | evict(3) @ after-layer(3)",
        [Cut("uniform | evict(6)"), Cut("fastv | evict(3)", 3)],
    ),
}
STEPS = 3


def lengths(tiny: Tiny, inputs: dict[str, Any]) -> list[tuple[int, int]]:
    parts = [part for row in tiny.rows for part in row.parts if isinstance(part, tuple)]
    counts = tiny.see(parts)[1]
    kinds = [IMAGE if part[0] == "image" else VIDEO for part in parts]
    return [
        (kind, count)
        for kind, whole in zip(kinds, counts, strict=True)
        for count in (tiny.split(whole) if tiny.split else [whole])
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", list(SPECS))
@pytest.mark.parametrize("tiny", FAMILIES, ids=lambda tiny: tiny.name)
def test_what_is_left_is_computed_as_the_model_would(tiny: Tiny, name: str, attention: str) -> None:
    spec, cuts = of_tiles(tiny, SPECS[name][0]), SPECS[name][1]
    inputs = collate(tiny, tiny.rows)
    how = {} if tiny.patch is None else {"patch": tiny.patch(inputs)}
    wanted, left, text = expected(
        tiny.make("eager"), inputs, lengths(tiny, inputs), cuts, STEPS, **how
    )
    model = tiny.make(attention)
    with torch.no_grad(), tokenprune.attach(model, spec):
        got = model(**inputs).logits
        said = model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, suppress_tokens=SPECIAL
        )
    torch.testing.assert_close(got[left], wanted[left], atol=5e-5, rtol=0)
    assert torch.equal(said[:, -STEPS:], text)


@pytest.mark.parametrize("tiny", FAMILIES, ids=lambda tiny: tiny.name)
def test_a_full_budget_changes_no_bit_and_detaching_restores(tiny: Tiny) -> None:
    model, inputs = tiny.make("sdpa"), collate(tiny, tiny.rows)
    names, real = set(vars(model.model)), inputs["attention_mask"].bool()
    with torch.no_grad():
        plain = model(**inputs).logits
        for spec in ("uniform | evict(1.0)", "uniform | evict(1.0) @ after-layer(1)"):
            with tokenprune.attach(model, spec):
                assert torch.equal(model(**inputs).logits[real], plain[real])
        assert set(vars(model.model)) == names
        assert torch.equal(model(**inputs).logits, plain)
