"""Generated tables are those of today."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from support.markdown import ROOT
from tokenprune.plugins import registry
from tokenprune.plugins.manager import Offer


@pytest.fixture
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_up_to_date(tables: ModuleType) -> None:
    assert len(tables.PAGES) == 2
    for page in tables.PAGES:
        text = page.read_text()
        assert tables.with_tables(text) == text, f"run `make tables`: {page.name} is out of date"


def test_every_strategy_of_ours_is_in_them(tables: ModuleType) -> None:
    text = (ROOT / "README.md").read_text()
    known = tables.own(registry())
    for offers in (known.scorers, known.reducers, known.recipes):
        assert offers
        for offer in offers:
            assert f"| `{offer.plugin.name}` |" in text


def test_every_known_difference_is_in_the_reference(tables: ModuleType) -> None:
    text = (ROOT / "docs" / "reference" / "strategies.md").read_text()
    told = [o.plugin for o in tables.own(registry()).recipes if o.plugin.differs]
    assert told
    for plugin in told:
        assert f"| `{plugin.name}` | {plugin.differs} |" in text.replace(r"\|", "|")


def test_other_packages_are_not(tables: ModuleType) -> None:
    known = tables.own(registry())
    plugin = known.scorers[0].plugin
    known.scorers.append(Offer(plugin, "someone-elses"))
    assert len(tables.own(known).scorers) == len(known.scorers) - 1


def test_a_page_without_markers_is_refused(tables: ModuleType) -> None:
    with pytest.raises(ValueError, match="no place for the tables"):
        tables.with_tables("# Page\n")
