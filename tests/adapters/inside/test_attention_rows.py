"""Slots of prompts that ask for attention rows: the last one of each conversation."""

from __future__ import annotations

import torch

from tokenprune_adapters.llms.attention_rows import Prompts


def test_the_last_real_slot_of_each_row() -> None:
    real = torch.tensor([[False, True, True, False], [True, False, False, False], [False] * 4])
    assert Prompts(real, None, None).last().tolist() == [[2], [0], [0]]


def test_the_last_real_slot_of_each_conversation() -> None:
    """A conversation may be one slot, and rows may hold fewer conversations than others."""
    real = torch.tensor([[True, True, True, True], [False, True, True, True]])
    sample = torch.tensor([[0, 1, 1, 2], [-1, 0, 0, 1]])
    assert Prompts(real, None, sample).last().tolist() == [[0, 2, 3], [2, 3, 0]]
