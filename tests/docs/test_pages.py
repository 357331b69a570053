"""What pages point to exists: files, commands, make targets, public names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typer

import tokenprune.bench
import tokenprune.doctor
import tokenprune.testing
import tokenprune_adapters.pocket
from support.markdown import ROOT, blocks, links, name, pages
from tokenprune.cli.app import app


@pytest.mark.parametrize("page", pages(), ids=name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in links(page.read_text()):
        if not re.match(r"https?:|#", link):
            assert (page.parent / link.partition("#")[0]).exists(), link


def commands(text: str) -> Iterator[list[str]]:
    """The words of every shell command, lines that end with a backslash joined."""
    for block in blocks(text):
        if block.language == "sh":
            for line in block.code.replace("\\\n", " ").splitlines():
                yield line.split("  #")[0].split()


@pytest.mark.parametrize("page", pages(), ids=name)
def test_commands_and_their_options_exist(page: Path) -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for words in commands(page.read_text()):
        if words[:1] == ["tokenprune"]:
            options = {o for parameter in known[words[1]].params for o in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= options, words


@pytest.mark.parametrize("page", pages(), ids=name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text()
    named = {words[1] for words in commands(text) if words[:1] == ["make"]}
    named |= set(re.findall(r"`make ([a-z-]+)`", text))
    assert named <= targets


def test_readme_names_both_set_up_commands() -> None:
    made = [words for words in commands((ROOT / "README.md").read_text()) if words[0] == "make"]
    assert made == [["make", "demo"], ["make", "test"]]


@pytest.mark.parametrize(
    "package",
    [
        tokenprune,
        tokenprune.testing,
        tokenprune.bench,
        tokenprune.doctor,
        tokenprune_adapters.pocket,
    ],
    ids=lambda package: package.__name__,
)
def test_every_public_name_is_in_the_reference(package: ModuleType) -> None:
    reference = "\n".join(p.read_text() for p in (ROOT / "docs" / "reference").rglob("*.md"))
    shown = set(re.findall(r"^::: tokenprune\w*\.(?:\w+\.)*(\w+)", reference, re.MULTILINE))
    if "errors" in shown:
        shown |= {each for each in tokenprune.__all__ if each.endswith("Error")}
    assert set(package.__all__) - shown == set()
