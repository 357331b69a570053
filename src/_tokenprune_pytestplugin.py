"""The pytest plugin. A module of its own, so that pytest can load it without importing torch.

`pytest --tokenprune-plugin PKG` runs the contract on whatever the distribution PKG registers.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.getgroup("tokenprune").addoption(
        "--tokenprune-plugin",
        action="append",
        default=[],
        metavar="PKG",
        help="run tokenprune's contract on what this installed distribution registers; 'tokenprune'"
        " stands for the strategies that come along. Files given beside it run as well.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Collect the suite in place of the test paths, or beside the files that were given."""
    if not config.getoption("tokenprune_plugin"):
        return
    found = find_spec("tokenprune")  # does not import it
    assert found is not None
    assert found.origin is not None
    suite = str(Path(found.origin).parent / "testing" / "suite.py")
    given = config.args if config.args_source is config.ArgsSource.ARGS else []
    if suite not in given:
        config.args = [*given, suite]
