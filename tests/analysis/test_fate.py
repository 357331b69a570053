"""What became of patches, by hand-made plans and by a tiny any-resolution model."""

from __future__ import annotations

import pytest
import torch

import tokenprune
from support import llava_next
from tokenprune import Plan, ShapeError
from tokenprune.analysis.fate import DROPPED, Fate


def test_of_one_picture() -> None:
    plan = Plan.group(torch.tensor([[0, 2, 2, -1, 2]]), torch.ones(1, 5))
    fate = Fate.of(plan)
    assert fate.crops == ((0, 1, 1, DROPPED, 1),)
    assert fate.groups == {1: 1}


def test_a_group_across_crops_is_one_group() -> None:
    """Two crops of 4 patches; the second has no patch 0, and the row is padded at its end."""
    patches = torch.tensor([[0, 1, 2, 3, 5, 6, 7, -1]])
    groups = torch.tensor([[0, 1, 1, 3, 3, 5, -1, -1]])
    fate = Fate.of(Plan.group(groups, torch.ones(1, 8)), patches, crops=2, per_crop=4)
    assert fate.crops == ((0, 1, 1, 2), (None, 2, 3, DROPPED))
    assert fate.groups == {1: 1, 2: 2}


def test_rows_of_crops_are_groups_of_their_own() -> None:
    """Budgets per crop: a row for each crop, of which the last is nothing but padding."""
    patches = torch.tensor([[0, 1, 2], [1, 2, -1], [-1, -1, -1]])
    groups = torch.tensor([[0, 0, 2], [1, 1, -1], [-1, -1, -1]])
    plan = Plan.group(groups, torch.ones(3, 3))
    fate = Fate.of(plan, patches, rows=(0, 1, 2), crops=3, per_crop=3)
    assert fate.crops == ((0, 0, 1), (None, 2, 2), (None, None, None))
    assert fate.groups == {0: 1, 2: 2}


@pytest.mark.parametrize("per", ["image", "crop"])
@pytest.mark.parametrize("size", llava_next.SIZES)
def test_of_an_any_resolution_model(per: str, size: tuple[int, int]) -> None:
    model = llava_next.tiny_llava_next()
    picture = llava_next.Picture.of(size, seed=4)
    inputs = llava_next.collate([llava_next.Prompt([llava_next.BOS, picture, 12, 13])])
    with tokenprune.attach(model, f"cls-attention(layers=1) | evict(3, per={per!r})") as pruned:
        model(**inputs)
    last, crops = pruned.last, len(picture.crops)
    rows = range(last.plan.anchors.shape[0])
    fate = Fate.of(last.plan, last.patches, rows, crops, llava_next.PATCHES)
    expected = llava_next.kept(model, picture, 3, per)
    tokens = set(picture.packed) - {None}
    for crop, slots in enumerate(fate.crops):
        for patch, slot in enumerate(slots):
            assert (slot is None) == ((crop, patch) not in tokens)
            assert (slot not in (None, DROPPED)) == ((crop, patch) in expected)


@pytest.mark.parametrize(
    ("patches", "rows", "words"),
    [
        (None, (2,), r"row must be in \[0, 2\)"),
        (None, (), "got none"),
        (torch.tensor([[0, 1, 9], [0, 1, 2]]), (0,), "below 3, got .* up to 9"),
        (torch.tensor([[0, 1, 2]]), (0,), r"= \(2, 3\)"),
    ],
)
def test_refuses(patches: torch.Tensor | None, rows: tuple[int, ...], words: str) -> None:
    plan = Plan.select(torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ShapeError, match=words):
        Fate.of(plan, patches, rows, crops=1)
