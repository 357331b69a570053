"""The warning of releases that are newer than what was tested: once, and at the user's line."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest

from core.fakes import FakeAdapter, FakeTowerAdapter, Model, Tower, entry, installed, module_with
from tokenprune import ModelPlugin, TowerPlugin, attach, observe, versions, watch
from tokenprune.hooks import Removable
from tokenprune.observation import Attended
from tokenprune.versions import Library

OLD = Library("torch", "1.0", "1.1", "torch")
LATER = Library("pluggy", "0.1", "0.2", "comes_later")


class Watched(FakeAdapter):
    """A model that can be watched."""

    def watch(self, model: object, attended: Attended) -> Iterator[Removable]:
        return iter(())


def attaching() -> None:
    with attach(Model(), "random | evict(2)"):
        pass


def observing() -> None:
    with observe(Tower(), []):
        pass


def watching() -> None:
    with watch(Model()):
        pass


@pytest.fixture(autouse=True)
def _newer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(versions, "LIBRARIES", (OLD, LATER))
    monkeypatch.setattr(versions, "_looked_at", set())
    model, tower = (f"{each.__module__}.{each.__qualname__}" for each in (Model, Tower))
    models = [ModelPlugin("fake", "a fake", Watched, (model,))]
    towers = [TowerPlugin("fake", "a fake", FakeTowerAdapter, (tower,))]
    with installed(entry("fakes", module_with(models=models, towers=towers))):
        yield


@pytest.mark.parametrize("start", [attaching, observing, watching])
def test_it_is_shown_once_for_the_line_that_attaches(start: Callable[[], None]) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        start()
        attaching()
    (warning,) = told
    assert re.match(r"never tested with torch .* \(newest: 1.1\); `tokenpr", str(warning.message))
    assert warning.filename == __file__
    assert warning.lineno == start.__code__.co_firstlineno + 1


def test_a_library_that_comes_later_is_told_of_then(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="torch"):
        attaching()
    monkeypatch.setitem(sys.modules, "comes_later", sys)
    with pytest.warns(UserWarning, match="never tested with pluggy") as told:
        attaching()
    assert "torch" not in str(told[0].message)
