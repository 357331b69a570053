from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.hub_names import export
from support.served import Plain, Server
from tokenprune_adapters import pocket


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model, with the names of weights that vLLM expects."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed; make test-vllm has an environment with it")
    return export(pocket.CHECKPOINT, tmp_path_factory.mktemp("hub") / "pocket")


@pytest.fixture(scope="session")
def plain() -> Plain:
    """The shipped model in transformers."""
    return Plain()


@pytest.fixture(scope="module")
def server(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server process, parametrised by its spec and its options."""
    spec, options = request.param
    log = tmp_path_factory.mktemp("server") / "log"
    with Server(checkpoint, spec, options, log) as started:
        yield started
