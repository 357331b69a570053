"""Budgets of families: what a number of tokens is for."""

from __future__ import annotations

import pytest

import tokenprune
from support.families import FAMILIES
from tokenprune import UnsupportedError

NAMED = {tiny.name: tiny for tiny in FAMILIES}


@pytest.mark.parametrize("where", ["before-llm", "after-layer(2)"])
@pytest.mark.parametrize("name", ["internvl", "smolvlm", "idefics3"])
def test_tokens_of_a_picture_cannot_be_counted_where_tiles_are_handed_over(
    name: str, where: str
) -> None:
    model = NAMED[name].make("sdpa")
    with pytest.raises(UnsupportedError, match="tiles without saying.*per='crop', or keep as a fr"):
        tokenprune.attach(model, f"uniform | evict(5) @ {where}")
    tokenprune.attach(model, f"uniform | evict(5, per='crop') @ {where}").detach()
    tokenprune.attach(model, f"uniform | evict(0.5) @ {where}").detach()


@pytest.mark.parametrize("per", ["crop", "frame"])
def test_crops_and_frames_have_no_budgets_of_their_own(per: str) -> None:
    model = NAMED["qwen2-vl"].make("sdpa")
    with pytest.raises(UnsupportedError, match=f"per='{per}'.*a video over all its frames"):
        tokenprune.attach(model, f"uniform | evict(5, per='{per}')")
