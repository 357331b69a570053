"""The lock, and what says that an environment has only what it names."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import tomllib
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from support.markdown import ROOT
from support.script import script

# While `make lock` runs, the lock is the one that it has made: the old one may lack what is new.
LOCK = (ROOT / os.environ.get("TOKENPRUNE_LOCK", "requirements/lock.txt")).read_text()
LINES = [line.partition("#")[0].strip() for line in LOCK.splitlines() if line[0] != "#"]
PYTHONS = ("3.11.7", "3.12.1", "3.13.0")


@pytest.fixture
def locked() -> ModuleType:
    return script("tools/locked.py")


@pytest.fixture
def requirements() -> ModuleType:
    return script("tools/requirements.py")


def named(python: str, platform: str) -> dict[str, list[Requirement]]:
    """What the lock says on a machine, by name."""
    machine = {
        "python_full_version": python,
        "python_version": python.rpartition(".")[0],
        "sys_platform": platform,
        "platform_machine": "x86_64",
    }
    found: dict[str, list[Requirement]] = {}
    for each in map(Requirement, LINES):
        if each.marker is None or each.marker.evaluate(machine):
            found.setdefault(canonicalize_name(each.name), []).append(each)
    return found


@pytest.mark.parametrize("platform", ["linux", "darwin"])
@pytest.mark.parametrize("python", PYTHONS)
def test_every_package_has_one_exact_version_on_every_python(python: str, platform: str) -> None:
    for name, (requirement, *others) in named(python, platform).items():
        assert not others, name
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), requirement


@pytest.mark.parametrize("python", PYTHONS)
def test_everything_that_is_asked_for_is_named(python: str, requirements: ModuleType) -> None:
    asked = requirements.main(["--bare", "dev"]).split()
    assert {"torch", "transformers", "pytest"} <= set(asked)
    assert {canonicalize_name(each.partition("[")[0]) for each in asked} <= set(
        named(python, "linux")
    )


def test_versions_of_the_lock_are_what_pip_may_install() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    locked, compared = named("3.11.7", "linux"), 0
    for requirement in map(Requirement, itertools.chain(*lists)):
        (pin, *_) = locked.get(canonicalize_name(requirement.name), [None])
        if pin is not None and requirement.name != "filelock":  # of `eval`, which is not locked
            compared += 1
            (version,) = (each.version for each in pin.specifier)
            assert requirement.specifier.contains(version), (requirement, pin)
    assert compared > 15


def test_cuda_libraries_are_named_for_linux_alone() -> None:
    assert any(name.startswith("nvidia-") for name in named("3.12.1", "linux"))
    assert not any(name.startswith("nvidia-") for name in named("3.12.1", "darwin"))


def test_a_package_that_the_lock_does_not_name_is_told(locked: ModuleType) -> None:
    lock = (
        "torch==2.14.1  # via x\n"
        "numpy==2.0 ; python_version < '3'\n"
        "numpy==2.4 ; python_version > '3'\n"
    )
    fine = {"torch": "2.14.1+cpu", "numpy": "2.4", "tokenprune-vlm": "0.1.0"}
    assert locked.strangers(fine, lock) == []
    assert locked.strangers(fine | {"numpy": "2.0", "left-pad": "1.3"}, lock) == [
        "left-pad 1.3 is not in the lock",
        "numpy 2.0 is installed, the lock says ==2.4",
    ]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_a_new_lock_is_tested_itself_before_it_replaces_the_old_one() -> None:
    words = ["make", "--dry-run", "unit", "locked", "VENV=new-venv", "LOCK=pyproject.toml"]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = ran.stdout.splitlines()
    assert any("TOKENPRUNE_LOCK=pyproject.toml" in line and "pytest" in line for line in lines)
    assert "new-venv/bin/python tools/locked.py pyproject.toml" in lines


def test_what_is_installed_here_is_found(locked: ModuleType) -> None:
    assert {"torch", "pytest", "tokenprune-vlm"} <= set(locked.installed())


def test_an_extra_is_asked_for_without_the_project_itself(requirements: ModuleType) -> None:
    asked = requirements.main(["eval"]).splitlines()
    assert "filelock<4" in asked
    assert any(each.startswith("transformers>=") for each in asked)
    assert not any("tokenprune" in each for each in asked)


def test_names_alone_have_no_versions(requirements: ModuleType) -> None:
    asked = requirements.main(["--bare", "ray"]).splitlines()
    assert {"ray[data]", "torch", "transformers"} <= set(asked)
    assert len(asked) == len(set(asked))
    assert not re.search(r"[<>=]", "".join(asked))
