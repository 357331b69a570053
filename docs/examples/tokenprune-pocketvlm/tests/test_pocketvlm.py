"""The contract, and what it does not say: how one uses the plugin."""

import pytest
import torch
from tokenprune_pocketvlm.model import IMAGE
from tokenprune_pocketvlm.testing import build, cases, collate, prompts

import tokenprune
from tokenprune.doctor import examine
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
    kept = attachment.report.kept
    assert [(left.kind, left.number, left.crop) for left in kept] == [
        ("image", number, (0, 0, 0, 0)) for number in range(3)
    ]
    assert [list(left.patch) for left in kept] == attachment.last.plan.anchors.tolist()


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


@torch.no_grad()
def test_what_is_attended_to_are_rows_of_full_maps():
    """Of each prompt alone, read in one go, without a cache that was there before."""
    model, asked = build(), prompts()
    with tokenprune.watch(model) as seen:
        text, _ = model.generate(**collate(asked), steps=4)
    assert seen.steps.shape == (4, 3, model.config.layers, model.config.visual_tokens)
    maps = []
    for block in model.decoder.blocks:
        block.attention.register_forward_pre_hook(lambda m, a: maps.append(full_map(m, a[0])))
    images = iter(range(3))
    for number, prompt in enumerate(asked):
        maps.clear()
        ids = torch.tensor([prompt.inputs[0] + text[number, :3].tolist()])
        pictures = prompt.inputs[1]
        pixels = torch.stack(pictures) if pictures else None
        model(ids, torch.ones_like(ids, dtype=torch.bool), pixels)
        visual = (ids[0] == IMAGE).nonzero()[:, 0]
        for column in visual.reshape(-1, model.config.visual_tokens):
            image = next(images)
            for step in range(4):
                query = prompt.length - 1 + step
                expected = torch.stack([each[0, :, query, column].mean(0) for each in maps])
                torch.testing.assert_close(seen.steps[step, image], expected, rtol=0, atol=1e-6)


def full_map(module, x):
    query, keys = (module.split(part(x)) for part in (module.query, module.key))
    logits = query @ keys.mT / keys.shape[-1] ** 0.5
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return logits.masked_fill(later, -torch.inf).softmax(-1)


def test_prompts_without_pictures_are_forgotten():
    model = build()
    with tokenprune.watch(model) as seen:
        model.generate(**collate(prompts()[:1]), steps=2)
        assert len(seen.steps) == 2
        model.generate(**collate(prompts()[2:]), steps=2)
        with pytest.raises(tokenprune.MissingSignalError):
            _ = seen.steps
    assert not model._forward_hooks


def test_the_doctor_finds_nothing_and_would_find_a_wrong_plan():
    (found,) = examine(only=["pocketvlm"]).comparisons
    assert (found.outcome, found.where) == ("ok", "before the LLM")
    assert found.gap < 1e-4
    assert found.sensitivity > 1
