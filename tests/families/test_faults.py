"""Planted faults of this kind of code: each is found by a check of what is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor

from support.families import FAMILIES, case_of
from tokenprune import UnsupportedError
from tokenprune_adapters.hf import call_images, encoders, slot_patches, tiles, tower_attention
from tokenprune_adapters.hf.contract import CHECKS
from tokenprune_adapters.hf.family import Encoded
from tokenprune_adapters.hf.llm import (
    deepstack,
    layer_hooks,
    padding,
    short_prompt,
)
from tokenprune_adapters.hf.slots import Slots

from .test_signals import test_signals_are_those_of_the_eager_map as check_signals

Patch: TypeAlias = pytest.MonkeyPatch

NAMED = {tiny.name: tiny for tiny in FAMILIES}
BY = {check.__name__[6:8]: check for check in CHECKS}


def a_plane_dropped(patch: Patch) -> None:
    def outwards(positions: Tensor) -> Tensor:
        planes = positions.movedim(-1, 0)
        return torch.cat([planes[:-1], planes[-2:-1]])

    patch.setattr(short_prompt, "outwards", outwards)


def planes_of_later_layers_mixed_up(patch: Patch) -> None:
    patch.setattr(layer_hooks, "rotated", lambda positions: positions.movedim(-1, 0)[-3:].flip(0))


def deepstack_rows_unreduced(patch: Patch) -> None:
    patch.setattr(
        deepstack.DeepStack,
        "through",
        lambda self, layout: replace(
            self, row=self.row if layout is None else self.row[:, : layout.index.shape[1]]
        ),
    )


def deepstack_left_out(patch: Patch) -> None:
    patch.setattr(deepstack.DeepStack, "added", lambda self, hidden, layer: hidden)


def merged_features_beside_unmerged_deepstack(patch: Patch) -> None:
    original = Slots.reduced

    def reduced(self: Any, x: Tensor, plan: Any, gone: float) -> Tensor:
        return x if gone == 0 else original(self, x, plan, gone)

    patch.setattr(Slots, "reduced", reduced)


def order_of_tiles_reversed(patch: Patch) -> None:
    original = Slots.of.__func__  # type: ignore[attr-defined]

    def of(cls: Any, patches: Any, device: Any) -> Any:
        made = original(cls, patches, device)
        return replace(made, index=made.index.flip(0), mask=made.mask.flip(0))

    patch.setattr(Slots, "of", classmethod(of))


def newlines_counted(patch: Patch) -> None:
    from tokenprune_adapters.hf.family import Sight

    def told(self: Any, encoded: Any) -> list[Tensor]:
        return [torch.arange(len(each)) for each in encoded.elements]

    patch.setattr(Sight, "told", told)


def videos_in_the_place_of_pictures(patch: Patch) -> None:
    patch.setattr(call_images, "_in_order", lambda of_video, pictures, videos: videos + pictures)


def tiles_of_neighbours_joined(patch: Patch) -> None:
    """The second picture of a prompt takes a tile of the first."""
    original = tiles._runs

    def runs(ids: Tensor, held: Tensor) -> Any:
        return [
            [each._replace(tokens=run[1 - at].tokens) for at, each in enumerate(run)]
            if len(run) == 2
            else run
            for run in original(ids, held)
        ]

    patch.setattr(tiles, "_runs", runs)


def nested_encoders_reduce_twice(patch: Patch) -> None:
    """A method for videos calls that for images, which reduces as well."""

    def encode(self: Any, sight: Any, made: Any, call: Callable[[], Any]) -> Any:
        return self._reduced(sight, Encoded(self.parts.core, made), call())

    patch.setattr(encoders.Encoders, "encode", encode)


def deltas_of_decoding_off(patch: Patch) -> None:
    """Later tokens count from the shortened prompt."""

    def inwards(given: Tensor) -> Tensor:
        moved = original(given)
        return moved - 3 if moved.ndim == 3 and moved.shape[1] == 1 else moved

    original = padding.inwards
    patch.setattr(padding, "inwards", inwards)


COMPUTED = [
    (a_plane_dropped, "qwen2-vl", BY["f3"]),
    (
        planes_of_later_layers_mixed_up,
        "qwen2.5-vl",
        BY["f5"],
    ),
    (deepstack_rows_unreduced, "qwen3-vl", BY["f3"]),
    (deepstack_left_out, "qwen3-vl", BY["f3"]),
    (
        merged_features_beside_unmerged_deepstack,
        "qwen3-vl",
        BY["f4"],
    ),
    (
        order_of_tiles_reversed,
        "llava-onevision",
        BY["f3"],
    ),
    (newlines_counted, "llava-onevision", BY["f3"]),
    (videos_in_the_place_of_pictures, "qwen2-vl", BY["f5"]),
    (tiles_of_neighbours_joined, "internvl", BY["f3"]),
    (tiles_of_neighbours_joined, "smolvlm", BY["f3"]),
    (nested_encoders_reduce_twice, "qwen3-vl", BY["f4"]),
    (nested_encoders_reduce_twice, "qwen3-vl", BY["f8"]),
    (
        deltas_of_decoding_off,
        "qwen2-vl",
        BY["f7"],
    ),
]


@pytest.mark.parametrize(
    ("fault", "name", "check"), COMPUTED, ids=lambda each: str(getattr(each, "__name__", each))
)
def test_what_is_computed_shows_it(
    fault: Callable[[Patch], None], name: str, check: Callable[[Any], None], monkeypatch: Patch
) -> None:
    case = case_of(NAMED[name])
    fault(monkeypatch)
    # Or so wrong that it is refused.
    with pytest.raises((AssertionError, UnsupportedError)):
        check(case)


def window_order_not_undone(patch: Patch) -> None:
    _members(patch, "hf-qwen2-5-vl", slot_patches.merged_in_a_row)


def group_of_four_shifted(patch: Patch) -> None:
    _members(patch, "hf-qwen2-vl", lambda encoded: slot_patches.merged_in_a_row(encoded).roll(1))


def tiles_read_row_by_row(patch: Patch) -> None:
    def members(encoded: Any) -> Tensor:
        return slot_patches.shuffled(encoded).sort().values.flatten().sort().values.reshape(-1, 4)

    _members(patch, "hf-internvl", members)


def frames_as_one_picture(patch: Patch) -> None:
    original = tower_attention._Tap.fused

    def fused(self: Any, module: Any, args: Any, output: Tensor) -> None:
        found = self.read.found
        if found is not None:
            call = found["call", self.number]
            one = SimpleNamespace(seams=call.seams[[0, -1]], rotary=call.rotary)
            found["call", self.number] = one
        original(self, module, args, output)

    patch.setattr(tower_attention._Tap, "fused", fused)


def _members(patch: Patch, name: str, members: Any) -> None:
    """Another assignment of patches to tokens in one family."""
    original = tower_attention.ReadTower.__init__

    def start(self: Any, core: Any, tower: Any, signals: Any) -> None:
        original(self, core, replace(tower, members=members), signals)

    patch.setattr(tower_attention.ReadTower, "__init__", start)


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (window_order_not_undone, "qwen2.5-vl"),
        (group_of_four_shifted, "qwen2-vl"),
        (tiles_read_row_by_row, "internvl"),
        (frames_as_one_picture, "qwen3-vl"),
    ],
    ids=lambda each: str(getattr(each, "__name__", each)),
)
def test_what_is_read_of_the_tower_shows_it(
    fault: Callable[[Patch], None], name: str, monkeypatch: Patch
) -> None:
    with pytest.MonkeyPatch.context() as planted:
        fault(planted)
        with pytest.raises(AssertionError):
            check_signals(name, monkeypatch)
