"""What the site shows is what was written."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import markdown
import pytest

from support.markdown import ROOT, name, pages

ESCAPED = [page for page in pages() if r"\|" in page.read_text() and "docs" in page.parts]


def on_page_content(html: str) -> str:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.on_page_content(html)


@pytest.mark.parametrize("page", ESCAPED, ids=name)
def test_specs_in_tables_can_be_copied(page: Path) -> None:
    html = markdown.markdown(page.read_text(), extensions=["tables"])
    assert r"\|" in html  # Python-Markdown leaves it in, or the hook is not needed any more
    assert r"\|" not in on_page_content(html)
    assert "hooks: [docs/hooks.py]" in (ROOT / "mkdocs.yml").read_text()


def test_only_tables_are_changed() -> None:
    html = r"<p>a \| b</p><td><code>a \| b</code></td>"
    assert on_page_content(html) == r"<p>a \| b</p><td><code>a | b</code></td>"
