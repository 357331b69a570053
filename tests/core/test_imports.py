"""`import tokenprune` imports no model framework, and no extra."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {
    "transformers",
    "tokenizers",
    "open_clip",
    "torchvision",
    "PIL",
    "safetensors",
    "matplotlib",
    "typer",
    "rich",
    "hypothesis",
    "pytest",
    "tokenprune_adapters",
}


def imported_by(code: str) -> set[str]:
    """Top-level packages that a fresh Python holds after running `code`."""
    report = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    ran = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True
    )
    return set(ran.stdout.split())


def test_the_core_imports_no_model_framework() -> None:
    code = (
        "import tokenprune\n"
        "import torch\n"
        "tokens = tokenprune.VisualTokens.of(torch.rand(1, 9, 2))\n"
        "strategy = tokenprune.Strategy(tokenprune.RandomScorer(), tokenprune.Evict(3))\n"
        "assert strategy(tokens).tokens.lengths == (3,)\n"
    )
    assert not imported_by(code) & HEAVY


def test_reading_specs_and_refusing_models_imports_no_model_framework() -> None:
    """Adapters are found by class names: what claims LLaVA is known without transformers."""
    code = (
        "import tokenprune, torch\n"
        "assert tokenprune.spec_of(tokenprune.parse('vtc-cls(64)'))\n"
        "try: tokenprune.attach(torch.nn.Linear(2, 2), 'vtc-cls')\n"
        "except tokenprune.UnsupportedError as error:\n"
        "    assert 'LlavaForConditionalGeneration' in str(error)\n"
        "else: raise AssertionError\n"
    )
    assert not imported_by(code) & (HEAVY - {"tokenprune_adapters"})


@pytest.mark.parametrize(
    "code",
    [
        "import tokenprune; tokenprune.__version__, dir(tokenprune)",
        "from tokenprune.cli.app import app; import typer; typer.main.get_command(app)",
        "import sys; sys.argv = ['tokenprune', '--version']\n"
        "try: import runpy; runpy.run_module('tokenprune', run_name='__main__')\n"
        "except SystemExit: pass",
        "import sys; sys.argv = ['tokenprune', 'bench', '--help']\n"
        "try: import runpy; runpy.run_module('tokenprune', run_name='__main__')\n"
        "except SystemExit: pass",
    ],
    ids=["import", "commands", "version", "help"],
)
def test_what_needs_no_tensors_waits_for_no_torch(code: str) -> None:
    assert not imported_by(code) & {"torch", "rich"}


def test_completion_of_a_shell_waits_for_no_torch() -> None:
    code = (
        "import os, sys; sys.argv = ['tokenprune']\n"
        "os.environ |= {'_TOKENPRUNE_COMPLETE': 'complete_bash', 'COMP_CWORD': '1',"
        " 'COMP_WORDS': 'tokenprune be'}\n"
        "from tokenprune.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass"
    )
    found = imported_by(code)
    assert "bench" in found  # what it offers stands in front of the modules
    assert "torch" not in found


@pytest.mark.parametrize("package", ["PIL", "rich"])
def test_the_check_can_fail(package: str) -> None:
    pytest.importorskip(package)
    assert package in imported_by(f"import tokenprune\nimport {package}") & HEAVY


def test_every_public_name_is_there() -> None:
    import tokenprune

    assert sorted(tokenprune.__all__) == tokenprune.__all__
    assert all(hasattr(tokenprune, name) for name in tokenprune.__all__)
    assert len(set(tokenprune.__all__)) == len(tokenprune.__all__)
