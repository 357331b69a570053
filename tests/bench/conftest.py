from __future__ import annotations

import pytest

from tokenprune_adapters import pocket


@pytest.fixture(scope="session")
def shipped():
    """The shipped model and its processor."""
    return pocket.load()
