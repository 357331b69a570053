"""Settings and fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci",
    derandomize=True,
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "fuzz",
    max_examples=1500,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
# A mutant that 10 examples don't notice counts as not noticed: the score is a lower bound.
settings.register_profile("mutants", parent=settings.get_profile("ci"), max_examples=10)
settings.load_profile(os.environ.get("TOKENPRUNE_HYPOTHESIS_PROFILE", "ci"))

# Tiny tensors gain nothing from threads, and xdist runs one process per core.
torch.set_num_threads(1)


@pytest.fixture
def tokenprune() -> Callable[..., Any]:
    """Run a command that should work, in a terminal wide enough for its tables."""
    from typer.testing import CliRunner

    from tokenprune.cli.app import app

    def run(*arguments: object) -> Any:
        words = [str(argument) for argument in arguments]
        result = CliRunner().invoke(app, words, env={"COLUMNS": "160"}, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result

    return run
