"""`make bench` runs every script without arguments, so none may want one."""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path

import pytest

from support.markdown import ROOT

SCRIPTS = sorted((ROOT / "tests" / "benchmarks").glob("bench_*.py"))


class StartedError(Exception):
    """The command line was read; what follows takes minutes."""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_starts_without_arguments(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser) -> None:
        read(parser, [])
        raise StartedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(StartedError):
        runpy.run_path(str(script), run_name="__main__")


def test_make_runs_them_all() -> None:
    assert len(SCRIPTS) >= 4
    makefile = (ROOT / "Makefile").read_text()
    assert "for script in tests/benchmarks/bench_*.py; do" in makefile
