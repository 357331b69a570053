"""Draws the pictures of the documentation anew, by the commands and examples of its pages."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

DOCS = Path(__file__).parent
PAGE = DOCS / "how-to" / "pictures.md"
TOKENPRUNE = Path(sys.executable).with_name("tokenprune")


def blocks(text: str, language: str) -> list[str]:
    """The code of every block in `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> Iterator[list[str]]:
    """The words of commands that write into the documentation's images."""
    for block in blocks(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            if any(word.startswith("docs/images/") for word in words):
                yield words


def main() -> None:
    """Write every picture."""
    text = PAGE.read_text(encoding="utf-8")
    for words in commands(text):
        subprocess.run([TOKENPRUNE, *words[1:]], cwd=DOCS.parent, check=True)
    with TemporaryDirectory() as folder:
        example = "\n".join(blocks(text, "python"))
        subprocess.run([sys.executable, "-c", example], cwd=folder, check=True)
        demo = [TOKENPRUNE, "demo", "--runs", "0", "--out", folder]
        subprocess.run(demo, check=True, stdout=subprocess.DEVNULL)
        for name in ("crops.png", "overlay.png"):
            shutil.copyfile(Path(folder) / name, DOCS / "images" / name)


if __name__ == "__main__":
    main()
