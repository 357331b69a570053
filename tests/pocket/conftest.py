from __future__ import annotations

from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tokenprune_adapters import pocket  # noqa: E402


@pytest.fixture(scope="session")
def pocket_model():
    """The shipped model and its processor."""
    return pocket.load()


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
