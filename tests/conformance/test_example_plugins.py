"""The packages in docs/examples: installed, they pass their own tests and the plugin's.

They run in processes of their own, the way that a third party would run them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
NAMES = ["tokenprune-sharpness", "tokenprune-pocketvlm", "tokenprune-quilt"]


FEW = """
from hypothesis import settings

settings.register_profile("few", max_examples=20, derandomize=True, database=None)
settings.load_profile("few")
"""
"""Examples enough to see that a package is checked; the gallery shows that checks bite."""


def run_pytest(where: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    # Those of this run, such as xdist's, are not theirs.
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    if (where / "few.py").exists():
        command += ["-p", "few"]
        clean["PYTHONPATH"] = str(where)
    return subprocess.run(
        command, cwd=where, env=clean, capture_output=True, text=True, check=False
    )


@pytest.fixture(params=NAMES)
def example(request):
    """The name of an example that is installed."""
    try:
        distribution(request.param)
    except PackageNotFoundError:
        pytest.fail(f"pip install --no-deps -e docs/examples/{request.param} (make does it)")
    return request.param


def test_its_own_tests_pass(example):
    done = run_pytest(EXAMPLES / example)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_the_contract_holds_without_a_test_file(example, tmp_path):
    (tmp_path / "few.py").write_text(FEW)
    done = run_pytest(tmp_path, "--tokenprune-plugin", example)
    assert done.returncode == 0, done.stdout + done.stderr
    steps, towers, models = 10 + 19, 6 + 1, 15 + 1
    promises = {
        "tokenprune-sharpness": 10,
        "tokenprune-pocketvlm": towers + models,
        "tokenprune-quilt": steps + towers + models,
    }[example]
    assert f"{promises} passed" in done.stdout


def test_files_given_beside_the_option_run_as_well(tmp_path):
    (tmp_path / "few.py").write_text(FEW)
    (tmp_path / "test_mine.py").write_text("def test_mine():\n    assert True\n")
    done = run_pytest(tmp_path, "--tokenprune-plugin", "tokenprune-sharpness", "test_mine.py")
    assert "11 passed" in done.stdout


def test_a_distribution_that_offers_nothing_is_named(tmp_path):
    done = run_pytest(tmp_path, "--tokenprune-plugin", "nobody")
    assert done.returncode != 0
    assert "no plugin comes from 'nobody'; plugins come from" in done.stdout


def test_an_adapter_without_a_case_fails(tmp_path):
    only = ("-k", "adapter_has_a_case and hf-llava")
    done = run_pytest(tmp_path, "--tokenprune-plugin", "tokenprune-vlm", *only)
    assert done.returncode == 1
    assert "offers an adapter for the model hf-llava, but no case to try it on" in done.stdout


def test_the_option_costs_nothing_when_it_is_not_used(tmp_path):
    """Every pytest run of an environment loads the plugin: it must not import torch."""
    (tmp_path / "test_light.py").write_text(
        "import sys\n\ndef test_light():\n    assert 'torch' not in sys.modules\n"
    )
    done = run_pytest(tmp_path, "test_light.py")
    assert "1 passed" in done.stdout, done.stdout


def test_the_scorer_has_ten_lines():
    source = (EXAMPLES / NAMES[0] / "src" / "tokenprune_sharpness" / "scorer.py").read_text()
    body = source.partition("@dataclass")[2].splitlines()
    assert len([line for line in body if line.strip() and "--8<--" not in line]) <= 10
