"""The contract, and what it does not say: how one uses the plugin."""

import pytest
import torch
from tokenprune_pocketvlm.testing import build, cases, collate, prompts

import tokenprune
from tokenprune.testing import parametrize_with_checks


@parametrize_with_checks(cases())
def test_contract(case, check):
    check(case)


def test_a_spec_is_all_it_takes():
    model, batch = build(), collate(prompts())
    with tokenprune.attach(model, "vtc-cls(keep=4)") as attachment:
        text, _ = model.generate(**batch, steps=5)
    assert text.shape == (3, 5)
    assert [image.after for image in attachment.report.images] == [4, 4, 4]


def test_merging_acts_before_the_projector():
    model, batch = build(), collate(prompts()[:1])
    seen = []
    with tokenprune.attach(model, "random | evict(3)"):
        handle = model.projector[0].register_forward_hook(lambda m, a, out: seen.append(out.shape))
        model(**batch)
        handle.remove()
    assert seen == [torch.Size([1, 3, 24])]


def test_original_positions_are_refused():
    with pytest.raises(tokenprune.UnsupportedError, match="original"):
        tokenprune.attach(build(), "random | evict(3) @ before-llm(positions='original')")
