"""Generated tables are those of today."""

from __future__ import annotations

import re
import tomllib
from types import ModuleType

import pytest

from support.markdown import ROOT
from support.script import script
from tokenprune.plugins import registry
from tokenprune.plugins.offers import Offer
from tokenprune.versions import LIBRARIES, library


@pytest.fixture
def tables() -> ModuleType:
    return script("docs/tables.py")


def test_tables_are_up_to_date(tables: ModuleType) -> None:
    assert len(tables.PAGES) == 4
    for page in tables.PAGES:
        text = page.read_text()
        assert tables.with_tables(text) == text, f"run `make tables`: {page.name} is out of date"


def test_every_strategy_of_ours_is_in_them(tables: ModuleType) -> None:
    text = (ROOT / "docs" / "reference" / "strategies.md").read_text()
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


def test_every_page_has_its_places(tables: ModuleType) -> None:
    readme, strategies, compatibility, _ = (page.read_text() for page in tables.PAGES)
    assert tables.STRATEGIES[0] in strategies
    assert tables.SIX[0] in readme
    for text in (readme, compatibility):
        assert tables.VERSIONS[0] in text
    assert tables.DIFFERENCES[0] in strategies


def test_a_place_without_an_end_is_refused(tables: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"no place for the tables: <!-- versions"):
        tables.with_tables(f"{tables.VERSIONS[0]}\n")


def test_every_library_is_in_the_table_of_versions(tables: ModuleType) -> None:
    for each in LIBRARIES:
        (row,) = (line for line in tables.versions().splitlines() if f"`{each.name}`" in line)
        assert each.oldest in row
        assert each.newest in row
        assert all(f"`make {target}`" in row for target in each.tested)


def test_versions_in_what_the_doctor_is_said_to_print_are_those_of_the_table() -> None:
    page = (ROOT / "docs" / "how-to" / "doctor.md").read_text()
    shown = [
        line for line in page.splitlines() if re.match(r"[\w-]+ +(-|[\d.]+) +[\d.]+ to ", line)
    ]
    assert len(shown) > 2
    for line in shown:
        name, _, tested = re.split("  +", line)[:3]
        assert tested == library(name).span, line


def test_projects_ask_for_the_versions_of_the_table(tables: ModuleType) -> None:
    assert len(tables.PROJECTS) == 4
    for project in tables.PROJECTS:
        text = project.read_text()
        assert tables.with_versions(text) == text, f"run `make tables`: {project} is out of date"


def test_every_library_of_the_table_has_its_limits_in_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert project["requires-python"] == f">={library('python').oldest}"
    assert f"Programming Language :: Python :: {library('python').newest}" in project["classifiers"]
    for each in LIBRARIES:
        asked = extras[each.extra] if each.extra else project["dependencies"]
        if each.name not in ("python", "vllm"):  # the interpreter; pins its own torch
            assert each.requirement in {re.sub(r"\[.*\]", "", requirement) for requirement in asked}


def test_versions_in_a_project_are_replaced_and_nothing_else(tables: ModuleType) -> None:
    text = (
        'requires-python = ">=3.2"\n'
        'dependencies = ["torch>=1", "torchvision>=1", "ray[data]>=2,<3"]\n'
    )
    torch, ray = library("torch"), library("ray")
    assert tables.with_versions(text) == (
        f'requires-python = ">={library("python").oldest}"\n'
        f'dependencies = ["{torch.requirement}", "torchvision>=1", '
        f'"ray[data]>={ray.oldest},<{ray.limit}"]\n'
    )
