"""What the contract kit needs to know: prompts for PocketVLM, and how it is called."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune import ClsAttention, Placement, Signal
from tokenprune.testing import ModelCase, Prompt, TowerCase

from .model import IMAGE, Cache, Config, PocketVLM, Vision
from .trials import build, picture

PAD = 0


# --8<-- [start:prompts]
def prompt(*parts: int | Tensor) -> Prompt:
    """A prompt of ids of words and of pictures."""
    visual = Config().visual_tokens
    images = [part for part in parts if isinstance(part, Tensor)]
    ids = [n for p in parts for n in ([IMAGE] * visual if isinstance(p, Tensor) else [p])]
    return Prompt((ids, images), length=len(ids), visual=(visual,) * len(images))


def prompts() -> list[Prompt]:
    """One picture, two, and text longer than the first: of different lengths, to be padded."""
    return [
        prompt(11, 12, picture(1), 13, 14),
        prompt(21, picture(2), 22, 23, picture(3), 24, 25, 26),
        prompt(*range(28, 49)),
    ]


def collate(batch: Sequence[Prompt]) -> dict[str, Any]:
    """Left-padded arguments of `PocketVLM.forward`."""
    longest = max(prompt.length for prompt in batch)
    ids = [[PAD] * (longest - prompt.length) + prompt.inputs[0] for prompt in batch]
    images = [image for prompt in batch for image in prompt.inputs[1]]
    made = torch.tensor(ids)
    inputs = {"ids": made, "mask": made != PAD}
    return {**inputs, "pixels": torch.stack(images)} if images else inputs
    # --8<-- [end:prompts]


def extend(inputs: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """The same prompts with text appended."""
    mask = torch.cat([inputs["mask"], torch.ones_like(ids, dtype=torch.bool)], dim=1)
    return {**inputs, "ids": torch.cat([inputs["ids"], ids], dim=1), "mask": mask}


# --8<-- [start:turns]
def turns(model: nn.Module, several: Sequence[dict[str, Any]]) -> Tensor:
    """`(1, vocabulary)` logits after the last of several turns of one prompt, on one cache."""
    cache, mask = None, torch.zeros(1, 0, dtype=torch.bool)
    for inputs in several:
        mask = torch.cat([mask, inputs["mask"]], dim=1)
        output = model(**{**inputs, "mask": mask}, cache=cache)
        cache = output.cache
    logits: Tensor = output.logits
    return logits


def joined(several: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The same turns as one prompt."""
    pixels = [inputs["pixels"] for inputs in several if "pixels" in inputs]
    made = {name: torch.cat([each[name] for each in several], dim=1) for name in ("ids", "mask")}
    return {**made, "pixels": torch.cat(pixels)} if pixels else made
    # --8<-- [end:turns]


# --8<-- [start:oracle]
def by_hand(
    model: nn.Module, prompt: Prompt, kept: list[list[int]], placement: Placement, steps: int
) -> Tensor:
    """`(steps, vocabulary)` logits of one prompt, without cache, padding and hooks."""
    assert isinstance(model, PocketVLM)
    ids, images = prompt.inputs
    pieces, image, place = [], 0, 0
    while place < len(ids):
        if ids[place] == IMAGE:
            patches = model.vision(images[image][None])[0, 1:]
            pieces.append(model.projector(patches[kept[image]]))
            image, place = image + 1, place + len(patches)
        else:
            pieces.append(model.embed(torch.tensor(ids[place : place + 1])))
            place += 1
    x, logits = torch.cat(pieces)[None], []
    for _ in range(steps):
        mask, positions = torch.ones(x.shape[:2], dtype=torch.bool), torch.arange(x.shape[1])
        hidden = model.decoder(x, mask=mask, positions=positions[None], cache=Cache())
        logits.append(model.head(hidden[0, -1]))
        x = torch.cat([x, model.embed(logits[-1].argmax()[None, None])], dim=1)
    return torch.stack(logits)
    # --8<-- [end:oracle]


def row_by_hand(tower: nn.Module, inputs: dict[str, Any], signal: Signal) -> Tensor:
    """[CLS] rows of the blocks, from full attention maps."""
    assert isinstance(tower, Vision)
    assert isinstance(signal, ClsAttention)
    assert isinstance(signal.layers, tuple)
    maps: list[Tensor] = []
    handles = [
        block.attention.register_forward_pre_hook(
            lambda module, args: maps.append(
                torch.einsum(
                    "bhqc,bhkc->bhqk",
                    module.split(module.query(args[0])),
                    module.split(module.key(args[0])),
                )
                .div((module.query.out_features / module.heads) ** 0.5)
                .softmax(-1)
            )
        )
        for block in tower.blocks
    ]
    tower(**inputs)
    for handle in handles:
        handle.remove()
    return torch.stack([maps[layer][:, :, 0, 1:] for layer in signal.layers], dim=1)


# --8<-- [start:cases]
def cases() -> Iterable[TowerCase | ModelCase]:
    """What `pytest --tokenprune-plugin tokenprune-pocketvlm` builds and checks."""
    yield TowerCase(
        "pocketvlm's tower",
        build=lambda: build().vision,
        inputs=lambda: {"pixels": torch.stack([picture(n) for n in range(3)])},
        signals=[ClsAttention(layers=(-1,)), ClsAttention(layers=(-3, -1))],
        feature_layer=-1,
        features=lambda tower, inputs: tower(**inputs)[:, 1:],
        oracle=row_by_hand,
    )
    yield ModelCase(
        "pocketvlm",
        build,
        prompts,
        collate,
        next_logits=lambda model, inputs: model(**inputs).logits,
        generate=lambda model, inputs, steps: model.generate(**inputs, steps=steps),  # type: ignore[operator]
        extend=extend,
        cache_lengths=lambda model, inputs: [k.shape[2] for k in model(**inputs).cache.keys],
        cache=lambda model, inputs: model(**inputs).cache,
        turns=turns,
        joined=joined,
        beams=None,
        oracle=by_hand,
    )
    # --8<-- [end:cases]
