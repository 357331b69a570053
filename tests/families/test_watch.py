"""What families' tokens attend to equals the eager maps of the plain model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokenprune
from support.families import FAMILIES, Tiny, case_of
from tokenprune import UnsupportedError


@pytest.mark.parametrize("tiny", FAMILIES, ids=lambda tiny: tiny.name)
def test_layers_with_states_are_refused(tiny: Tiny) -> None:
    case = case_of(tiny)
    model = case.build("sdpa")
    if not case.family.states:
        tokenprune.attach(model, "uniform | evict(0.5) @ after-layer(2)").detach()
        return
    words = "has linear_attention layers.*nothing can be left out after a layer, nor be watched"
    with pytest.raises(UnsupportedError, match=words):
        tokenprune.attach(model, "uniform | evict(0.5) @ after-layer(2)")
    with pytest.raises(UnsupportedError, match=words), tokenprune.watch(model):
        pass


@pytest.mark.parametrize(
    "tiny", [each for each in FAMILIES if not case_of(each).family.states], ids=lambda t: t.name
)
def test_rows_are_those_of_the_eager_map(tiny: Tiny) -> None:
    case = case_of(tiny)
    inputs, plain = case.inputs((0, 1)), case.build("eager")
    parts = case.anatomy(plain)
    maps: list[Any] = []
    handles = [
        layer.self_attn.register_forward_hook(lambda m, a, out: maps.append(out[1]))
        for layer in parts.llm.layers
    ]
    with torch.no_grad():
        plain(**inputs)
    for handle in handles:
        handle.remove()
    wanted = torch.stack([each.mean(1)[:, -1] for each in maps], dim=1)  # prompt, layer, slot
    model = case.build("sdpa")
    with torch.no_grad(), tokenprune.watch(model) as seen:
        model(**inputs)
    slots = {k: parts.placeholders(inputs["input_ids"], k).nonzero() for k, _ in case.rows}
    order = sorted(range(len(case.rows)), key=lambda n: case.rows[n][0] == "video")
    taken = dict.fromkeys(slots, 0)
    for image, number in enumerate(order):
        kind, length = case.rows[number]
        prompt, column = slots[kind][taken[kind] : taken[kind] + length].T
        taken[kind] += length
        if case.patches is not None:
            column = column[case.patches[number] >= 0]
        got = seen.steps[0, image, :, : len(column)]
        torch.testing.assert_close(got, wanted[prompt[0]][:, column], atol=1e-6, rtol=0)
