"""Every shipped family keeps its promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import tokenprune
from support.families import ALL, FAMILIES, Tiny, case_of
from tokenprune import UnsupportedError
from tokenprune_adapters.hf import checks
from tokenprune_adapters.hf.checks import VERSION
from tokenprune_adapters.hf.contract import CHECKS, FamilyCase
from tokenprune_adapters.hf.families import FAMILIES as SHIPPED


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("tiny", FAMILIES, ids=lambda tiny: tiny.name)
def test_families_keep(tiny: Tiny, check: Callable[[FamilyCase], None]) -> None:
    check(case_of(tiny))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("tiny", [each for each in FAMILIES if each.split], ids=lambda t: t.name)
def test_families_keep_for_tiles(tiny: Tiny, check: Callable[[FamilyCase], None]) -> None:
    check(case_of(tiny, per="crop"))


def test_every_class_of_every_family_is_built() -> None:
    built = {type(tiny.make("sdpa")).__name__ for tiny in FAMILIES if tiny.family is None}
    shipped = [family for family in SHIPPED if family.oldest <= VERSION]
    assert built == {each.rpartition(".")[2] for family in shipped for each in family.classes}


@pytest.mark.parametrize("tiny", ALL, ids=lambda tiny: tiny.name)
def test_older_releases_of_transformers_are_refused(tiny: Tiny, monkeypatch: Any) -> None:
    case, model = case_of(tiny), tiny.make("sdpa")
    monkeypatch.setattr(checks, "VERSION", (case.family.oldest[0], case.family.oldest[1] - 1))
    with pytest.raises(UnsupportedError, match="needs transformers .* or newer, found"):
        tokenprune.attach(model, "uniform | evict(0.5)")
