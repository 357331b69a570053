"""Code blocks and links of Markdown pages, by a few plain rules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its first line in the page, its code."""

    language: str
    line: int
    code: str


def pages() -> list[Path]:
    """README and documentation; packages under docs/examples test themselves."""
    found = sorted((ROOT / "docs").rglob("*.md"))
    return [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(page for page in found if "examples" not in page.relative_to(ROOT).parts),
    ]


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page. Indented fences, as in lists, are found too."""
    language, start, lines = None, 0, []
    for number, line in enumerate(text.splitlines(), start=1):
        fence = re.match(r"\s*```\s*(\S*)", line)
        if fence is None:
            lines.append(line)
        elif language is None:
            language, start, lines = fence.group(1), number + 1, []
        else:
            indent = min((len(s) - len(s.lstrip()) for s in lines if s.strip()), default=0)
            yield Block(language, start, "\n".join(s[indent:] for s in lines) + "\n")
            language = None
    if language is not None:
        raise ValueError(f"the block that starts at line {start} never ends")


def links(text: str) -> Iterator[str]:
    """Targets of the links and images of a page, those in code blocks left out."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    yield from re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose))


def name(page: Path) -> str:
    """For test ids."""
    return str(page.relative_to(ROOT))
