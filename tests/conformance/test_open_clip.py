"""Towers of open_clip keep the contract: observed, and as models that reduce inside themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from support.open_clip_towers import PATCHES, TOWERS, WITH_CLS, blocks_of, maps, pictures, prefix_of
from tokenprune import AfterLayer, BeforeLLM, ClsAttention, ReceivedAttention, Signal
from tokenprune.testing import ModelCase, Prompt, TowerCase, parametrize_with_checks


def maker(name: str) -> Callable[[], nn.Module]:
    """Makes a tower of its own each time."""
    made: Callable[[], nn.Module] = getattr(TOWERS[name], "__wrapped__")  # noqa: B009
    return made


def of_maps(tower: nn.Module, inputs: dict[str, Tensor], signal: Signal) -> Tensor:
    """From whole attention maps; the features are those of the last block but one."""
    prefix, whole = prefix_of(tower), maps(tower, inputs["x"])[: len(blocks_of(tower))]
    if isinstance(signal, ClsAttention):
        return torch.stack([each[:, :, 0, prefix:] for each in whole[-3:-1]], dim=1)
    assert isinstance(signal, ReceivedAttention)
    return torch.stack([each[:, :, prefix:, prefix:].mean(2) for each in whole[-2:-1]], dim=1)


def tower_case(name: str) -> TowerCase:
    cls: list[Signal] = [ClsAttention(2)] if name in WITH_CLS else []
    return TowerCase(
        f"open_clip {name}",
        maker(name),
        lambda: {"x": pictures()},
        [*cls, ReceivedAttention(1)],
        oracle=of_maps,
    )


def embedded(tower: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    out: Tensor = tower(inputs["x"])
    return out


def repeated(tower: nn.Module, inputs: dict[str, Tensor], steps: int) -> tuple[Tensor, Tensor]:
    """An embedding for each step: there is one answer only."""
    logits = embedded(tower, inputs)[:, None].expand(-1, steps, -1)
    return logits.argmax(2), logits


def tokens_per_block(tower: nn.Module, inputs: dict[str, Tensor]) -> list[int]:
    counted: list[int] = []

    def count(block: nn.Module, args: tuple[Tensor, ...]) -> None:
        counted.append(args[0].shape[1])

    handles = [block.attn.register_forward_pre_hook(count) for block in blocks_of(tower)]
    try:
        tower(inputs["x"])
    finally:
        for handle in handles:
            handle.remove()
    return counted


def prompts(prefix: int) -> Sequence[Prompt]:
    return [Prompt(each, prefix + PATCHES, (PATCHES,)) for each in pictures()]


def collate(batch: Sequence[Prompt]) -> dict[str, Any]:
    return {"x": torch.stack([prompt.inputs for prompt in batch])}


def reducing_case(name: str, prefix: int) -> ModelCase:
    return ModelCase(
        f"open_clip {name}, inside",
        maker(name),
        partial(prompts, prefix),
        collate,
        placements=[AfterLayer(1), (AfterLayer(1), AfterLayer(3))],
        unsupported=[BeforeLLM()],
        next_logits=embedded,
        generate=repeated,
        extend=lambda inputs, ids: inputs,
        cache_lengths=tokens_per_block,
        text=False,
    )


def cases() -> Iterable[TowerCase | ModelCase]:
    yield from map(tower_case, TOWERS)
    yield reducing_case("native", 1)
    yield reducing_case("eva02", 3)
    yield reducing_case("siglip", 0)


@parametrize_with_checks(cases())
def test_contract(case, check):
    check(case)
