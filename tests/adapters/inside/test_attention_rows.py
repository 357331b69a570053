"""Slots of prompts that ask for attention rows: the last one of each conversation."""

from __future__ import annotations

import torch

from tokenprune_adapters.hf.llm.text_attention import Prompts


def test_the_last_real_slot_of_each_row() -> None:
    real = torch.tensor([[False, True, True, False], [True, False, False, False], [False] * 4])
    assert Prompts(real, None, None).last().tolist() == [[2], [0], [0]]


def test_the_last_real_slot_of_each_conversation() -> None:
    """A conversation may be one slot, and rows may hold fewer conversations than others."""
    real = torch.tensor([[True, True, True, True], [False, True, True, True]])
    sample = torch.tensor([[0, 1, 1, 2], [-1, 0, 0, 1]])
    assert Prompts(real, None, sample).last().tolist() == [[0, 2, 3], [2, 3, 0]]


def test_slots_see_what_is_real_and_not_behind_them() -> None:
    """Slots are the newest keys: with two cached, slot 1 is key 3."""
    real = torch.tensor([[True, True, True], [False, True, True]])
    valid = torch.cat([torch.tensor([[True, False], [True, True]]), real], dim=1)
    queries = torch.tensor([[1, 2], [1, 1]])
    seen = Prompts(real, valid, None).visible(queries, 5)
    assert [[row.nonzero()[:, 0].tolist() for row in each] for each in seen] == [
        [[0, 2, 3], [0, 2, 3, 4]],
        [[0, 1, 3], [0, 1, 3]],
    ]


def test_slots_see_their_own_conversation_only() -> None:
    prompts = Prompts(torch.ones(1, 4, dtype=torch.bool), None, torch.tensor([[0, 0, 1, 1]]))
    seen = prompts.visible(torch.tensor([[1, 3, 2]]), 4)[0]
    assert [row.nonzero()[:, 0].tolist() for row in seen] == [[0, 1], [2, 3], [2]]
