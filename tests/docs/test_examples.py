"""Every python block of README and documentation runs as it stands."""

from __future__ import annotations

import builtins
from pathlib import Path

import pytest
import torch

from support.markdown import Block, blocks, name, pages

PAGES = [page for page in pages() if any(b.language == "python" for b in blocks(page.read_text()))]


def run(page: Path, found: list[Block]) -> None:
    """Run blocks one after the other, as a reader would, errors pointing into the page."""
    names: dict[str, object] = {"__name__": "__main__", "__builtins__": builtins}
    for block in found:
        padded = "\n" * (block.line - 1) + block.code
        # Without this file's own `from __future__`, which a reader's script does not have.
        exec(compile(padded, str(page), "exec", dont_inherit=True), names)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # for what examples write
    torch.manual_seed(0)
    run(page, [block for block in blocks(page.read_text()) if block.language == "python"])


def test_readme_and_tutorial_are_among_them() -> None:
    assert {"README.md", "docs/tutorial/first-compression.md"} <= {name(page) for page in PAGES}


def test_a_wrong_example_is_found() -> None:
    text = "Prose\n\n```python\nx = 1\n```\n\n```sh\nno\n```\n\n```python\nassert x == 2\n```\n"
    found = [block for block in blocks(text) if block.language == "python"]
    assert [block.line for block in found] == [4, 12]
    with pytest.raises(AssertionError) as caught:
        run(Path("page.md"), found)
    assert caught.traceback[-1].lineno == 11  # counted from 0


def test_a_block_without_end_is_found() -> None:
    with pytest.raises(ValueError, match="starts at line 2 never ends"):
        list(blocks("```python\nx = 1\n"))
