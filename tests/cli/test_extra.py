"""The command's packages are an extra: the library works without them, the command says so."""

from __future__ import annotations

import subprocess
import sys

BLOCKED = ("typer", "rich", "PIL", "matplotlib", "transformers")

BLOCK = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCK + code], capture_output=True, text=True, check=False
    )


def test_the_library_needs_none_of_them() -> None:
    result = run("import tokenprune, tokenprune.analysis; tokenprune.parse('vtc-cls(keep=3)')")
    assert result.returncode == 0, result.stderr


def test_the_block_blocks() -> None:
    """Otherwise the test above could not fail."""
    result = run(
        f"""
for package in {BLOCKED}:
    try:
        __import__(package)
    except ModuleNotFoundError as error:
        sys.stdout.write(f"{{error}}; ")
"""
    )
    assert result.stdout == "".join(f"No module named {name!r}; " for name in BLOCKED)


def test_the_command_says_what_to_install() -> None:
    result = run("from tokenprune.cli import main; main(['list'])")
    assert result.returncode == 2
    assert result.stderr == (
        "tokenprune: the command line needs typer, which is not installed; "
        "pip install 'tokenprune-vlm[cli]'\n"
    )
