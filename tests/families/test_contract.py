"""Every shipped family keeps its promises."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support.families import FAMILIES, Tiny, case_of
from tokenprune_adapters.hf.contract import CHECKS, FamilyCase
from tokenprune_adapters.hf.families import FAMILIES as SHIPPED


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("tiny", FAMILIES, ids=lambda tiny: tiny.name)
def test_families_keep(tiny: Tiny, check: Callable[[FamilyCase], None]) -> None:
    check(case_of(tiny))


def test_every_class_of_every_family_is_built() -> None:
    built = {type(tiny.make("sdpa")).__name__ for tiny in FAMILIES if tiny.family is None}
    assert built == {each.rpartition(".")[2] for family in SHIPPED for each in family.classes}
