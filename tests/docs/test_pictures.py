"""The pictures of the documentation come from commands that stand in it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from support.markdown import ROOT


@pytest.fixture
def pictures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_commands_that_draw_are_found_and_have_drawn(pictures: ModuleType) -> None:
    found = list(pictures.commands(pictures.PAGE.read_text()))
    assert len(found) == 2
    for words in found:
        assert words[:2] == ["tokenprune", "picture"]
        assert "vtc-cls(keep=14)" in words or "--heat" in words
        assert (ROOT / words[words.index("--out") + 1]).is_file()


def test_commands_that_write_elsewhere_are_not_run(pictures: ModuleType) -> None:
    text = "```sh\ntokenprune picture --out kept.png\n```\n"
    assert list(pictures.commands(text)) == []


def test_images_that_pages_show_are_there() -> None:
    for page in Path(ROOT / "docs").rglob("*.md"):
        for part in page.read_text().split("](")[1:]:
            if "images/" in part.partition(")")[0]:
                assert (page.parent / part.partition(")")[0]).is_file()
