"""What the contract kit needs to know: tiny models, prompts, answers without the adapter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune import BeforeLLM, ClsAttention, Keys, Placement
from tokenprune.testing import ModelCase, Prompt, ReducerCase, ScorerCase, TowerCase
from tokenprune_adapters.kit.peaked_weights import peaked

from .model import PATCH, Quilt, QuiltConfig
from .steps import FoldReducer, OutlierScorer

PATCHES, SIDE, WORDS = 16, 32, 60


def build() -> Quilt:
    """Random weights, the same every time, that make attention peaked."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    eye = {**sizes, "num_hidden_layers": 4, "image_size": SIDE, "patch_size": 8}
    llm = {**sizes, "num_hidden_layers": 3, "num_key_value_heads": 2, "vocab_size": WORDS}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Quilt(QuiltConfig(eye, **llm))
    # Small weights make all tokens look the same, and faults invisible.
    peaked(model)
    return model.eval()


def picture(seed: int) -> Tensor:
    """`(3, 32, 32)` noise."""
    return torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def prompt(*parts: int | Tensor) -> Prompt:
    """A prompt of ids of words and of pictures."""
    images = [part for part in parts if isinstance(part, Tensor)]
    ids = [n for p in parts for n in ([PATCH] * PATCHES if isinstance(p, Tensor) else [p])]
    return Prompt((ids, images), length=len(ids), visual=(PATCHES,) * len(images))


def prompts() -> list[Prompt]:
    """One picture, two, and text longer than the first."""
    return [
        prompt(11, 12, picture(1), 13, 14),
        prompt(21, picture(2), 22, 23, picture(3), 24, 25, 26),
        prompt(*range(28, 52)),
    ]


def collate(batch: Sequence[Prompt]) -> dict[str, Any]:
    """Left-padded arguments of `Quilt.forward`."""
    longest = max(prompt.length for prompt in batch)
    ids = torch.tensor([[0] * (longest - each.length) + each.inputs[0] for each in batch])
    made: dict[str, Any] = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    most = max(len(prompt.visual) for prompt in batch)
    if most:
        rows = [[*each.inputs[1], *[torch.zeros(3, SIDE, SIDE)] * most][:most] for each in batch]
        made["pictures"] = torch.stack([torch.stack(row) for row in rows])
    return made


def generate(model: nn.Module, inputs: dict[str, Any], steps: int) -> tuple[Tensor, Tensor]:
    """Greedy ids and logits; a patch is no word."""
    made = model.generate(  # type: ignore[operator]
        **inputs,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        suppress_tokens=[PATCH],
        output_logits=True,
        return_dict_in_generate=True,
    )
    return made.sequences[:, -steps:], torch.stack(made.logits, dim=1)


def beams(model: nn.Module, inputs: dict[str, Any], steps: int, use_cache: bool) -> Tensor:
    """Ids of a search with two beams."""
    made: Tensor = model.generate(  # type: ignore[operator]
        **inputs,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        num_beams=2,
        suppress_tokens=[PATCH],
        use_cache=use_cache,
    )
    return made[:, -steps:]


def joined(several: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Turns as one prompt: everything in a row."""
    names = {name for inputs in several for name in inputs}
    return {
        name: torch.cat([inputs[name] for inputs in several if name in inputs], dim=1)
        for name in names
    }


# --8<-- [start:oracle]
def by_hand(
    model: nn.Module, prompt: Prompt, kept: list[list[int]], placement: Placement, steps: int
) -> Tensor:
    """`(steps, vocabulary)` logits of one prompt, without cache, padding and hooks."""
    assert isinstance(model, Quilt)
    assert isinstance(placement, BeforeLLM)
    ids, images = prompt.inputs
    words = model.get_input_embeddings()
    rows: list[Tensor] = []
    places: list[int] = []
    image = slot = 0
    while slot < len(ids):
        if ids[slot] == PATCH:
            states = model.eye(images[image][None], output_hidden_states=True).hidden_states[-2]
            rows.append(model.bridge(states[0, 1:][kept[image]]))
            places += [slot + patch for patch in kept[image]]
            image, slot = image + 1, slot + PATCHES
        else:
            rows.append(words(torch.tensor([ids[slot]])))
            places.append(slot)
            slot += 1
    x, logits = torch.cat(rows)[None], []
    positions = torch.tensor([places])
    if placement.positions != "original":
        positions = torch.arange(len(places))[None]
    for _ in range(steps):
        # Without a mask, gaps in positions would mean several prompts in a row.
        mask = torch.ones(x.shape[:2], dtype=torch.long)
        output = model.llm(
            inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=False
        )
        logits.append(output.logits[0, -1])
        allowed = logits[-1].index_fill(0, torch.tensor([PATCH]), -torch.inf)
        x = torch.cat([x, words(allowed.argmax()[None, None])], dim=1)
        positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)
    return torch.stack(logits)
    # --8<-- [end:oracle]


# --8<-- [start:cases]
def cases() -> Iterable[ScorerCase | ReducerCase | TowerCase | ModelCase]:
    """What `pytest --tokenprune-plugin tokenprune-quilt` builds and checks."""
    yield ScorerCase(OutlierScorer())
    yield ReducerCase(FoldReducer(4))
    yield TowerCase(
        "ViTModel",
        build=lambda: build().eye,
        inputs=lambda: {"pixel_values": torch.stack([picture(n) for n in range(3)])},
        signals=[ClsAttention(layers=2), ClsAttention(layers=(-1, 0)), Keys(layer=-2)],
        features=lambda tower, inputs: tower(**inputs, output_hidden_states=True).hidden_states[-2][
            :, 1:
        ],
    )
    yield ModelCase(
        "Quilt",
        build,
        prompts,
        collate,
        placements=[BeforeLLM(), BeforeLLM("original")],
        generate=generate,
        beams=beams,
        joined=joined,
        oracle=by_hand,
    )
    # --8<-- [end:cases]
