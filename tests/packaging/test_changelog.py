"""Fragments of the changelog have names that `make changelog` finds."""

from __future__ import annotations

import re
import tomllib

from support.markdown import ROOT, links

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["towncrier"]


def test_fragments_are_named_by_type_and_say_something() -> None:
    types = "|".join(each["directory"] for each in SETTINGS["type"])
    for fragment in (ROOT / SETTINGS["directory"]).iterdir():
        if fragment.name != ".gitkeep":
            assert re.fullmatch(rf"\+[\w-]+\.({types})\.md", fragment.name), fragment.name
            assert fragment.read_text().strip().endswith((".", ")")), fragment.name


def test_links_in_fragments_lead_somewhere_from_the_changelog() -> None:
    for fragment in (ROOT / SETTINGS["directory"]).glob("*.md"):
        for link in links(fragment.read_text()):
            assert link.startswith("http") or (ROOT / link.partition("#")[0]).exists(), link


def test_the_changelog_has_a_place_for_them() -> None:
    assert SETTINGS["start_string"] in (ROOT / SETTINGS["filename"]).read_text()
