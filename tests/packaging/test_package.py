"""What is built works where nothing of this checkout is, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from support.markdown import ROOT

pytest.importorskip("hatchling")
NAME = "tokenprune-vlm"
ALONE = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def run(*words: object, cwd: Path) -> str:
    ran = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=ALONE, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (built,) = folder.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as package indices and distributions do."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=source)
    (built,) = folder.glob("*.whl")
    return built


class Environment:
    """An environment with what tokenprune needs and nothing of tokenprune."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        self.bin = folder / "bin"
        (self.packages,) = folder.glob("lib/python*/site-packages")
        above = folder.parent / f"needed-by-{folder.name}"
        above.mkdir()
        for installed in Path(pytest.__file__).parents[1].iterdir():
            if "tokenprune" not in installed.name and installed.suffix != ".pth":
                (above / installed.name).symlink_to(installed)
        (self.packages / "needed.pth").write_text(f"{above}\n")

    def pip(self, *words: object) -> None:
        run(sys.executable, "-m", "pip", "--python", self.bin / "python", *words, cwd=self.folder)

    def install(self, built: Path) -> None:
        flags = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
        self.pip("install", "--quiet", *flags, built)

    def files(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


def test_demo_and_doctor_work_from_the_wheel_and_nothing_is_left_behind(
    environment: Environment, wheel: Path, tmp_path: Path
) -> None:
    before = environment.files()
    environment.install(wheel)
    where = "import tokenprune; print(tokenprune.__file__)"
    found = run(environment.bin / "python", "-c", where, cwd=tmp_path)
    assert Path(found.strip()).is_relative_to(environment.packages)

    told = run(environment.bin / "tokenprune", "demo", "--out", "pictures", cwd=tmp_path)
    assert "KV cache after prefill" in told
    assert list((tmp_path / "pictures").glob("*.png"))
    run(environment.bin / "tokenprune", "doctor", cwd=tmp_path)

    environment.pip("uninstall", "--quiet", "--yes", NAME)
    assert environment.files() == before


def test_the_sdist_installs_what_the_wheel_does(
    environment: Environment, sdist: Path, wheel: Path, tmp_path: Path
) -> None:
    other = Environment(tmp_path / "other")
    environment.install(sdist)
    other.install(wheel)
    assert environment.files() - other.files() == set()
    assert other.files() - environment.files() == set()
