"""vLLM's classes are those that ours override, or the engine does not start. Without vLLM."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from tokenprune import UnsupportedError
from tokenprune.versions import library
from tokenprune_adapters.vllm.parents import check_parents, overrides

RUN = tuple(map(int, library("vllm").newest.split(".")))


class Parent:
    """vLLM's, as ours was written for it."""

    def __init__(self, *, vllm_config: object, prefix: str = "") -> None: ...

    @property
    def model_id(self) -> str:
        return ""

    def _apply(self, mm_items: object, hf_kwargs: object) -> None: ...

    def embed(self, **kwargs: object) -> None: ...


class Renamed(Parent):
    """vLLM's of another version: a method takes other arguments."""

    def _apply(self, prompt: object, mm_items: object) -> None:  # type: ignore[override]
        ...


def ours(parent: Any) -> type:
    class Ours(parent):
        @overrides("vllm_config prefix")
        def __init__(self, *, vllm_config: object, prefix: str = "") -> None: ...

        @property
        @overrides("")
        def model_id(self) -> str:
            return "ours"

        @overrides("mm_items hf_kwargs", "mm_items options")
        def _apply(self, mm_items: object, **named: object) -> None: ...

        @overrides("kwargs")
        def embed(self, **kwargs: object) -> None: ...

        def _of_our_own(self) -> None: ...

    return Ours


@pytest.fixture(autouse=True)
def loud() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_the_parents_that_ours_were_written_for() -> None:
    check_parents((*RUN, 0), ours(Parent))


@pytest.mark.parametrize("missing", ["_apply", "embed", "model_id"])
def test_a_method_that_is_missing(missing: str) -> None:
    """Ours would never be called, and the first picture would end the engine."""
    members = {name: member for name, member in vars(Parent).items() if name != missing}
    older = type("Older", (), members)
    with pytest.raises(UnsupportedError, match=f"compressed: Older.{missing} is missing"):
        check_parents((0, 30, 0), ours(Parent), ours(older))


def test_other_parameters() -> None:
    with pytest.raises(UnsupportedError) as caught:
        check_parents((0, 28, 0), ours(Renamed))
    known = library("vllm")
    assert str(caught.value) == (
        "vLLM 0.28.0 cannot be served compressed: Renamed._apply takes (prompt mm_items), not "
        f"(mm_items hf_kwargs or mm_items options). Install another vLLM (tested: {known.oldest} "
        f"to {known.newest}), or a newer tokenprune-vlm"
    )


def test_a_parameter_more_on_a_constructor() -> None:
    class More(Parent):
        def __init__(self, *, vllm_config: object, prefix: str, role: str) -> None: ...

    with pytest.raises(UnsupportedError, match=r"More.__init__ takes \(vllm_config prefix role\)"):
        check_parents(RUN, ours(More))


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ((RUN[0], RUN[1] + 1, 0), f"never run with vLLM {RUN[0]}.{RUN[1] + 1}.0 \\(tested: "),
        ((0, 1, 0), "never run with vLLM 0.1.0"),
        ((1, 0, "dev7", "g123"), "never run with vLLM 1.0.dev7"),
        ((0, 0, "dev"), "never run with vLLM 0.0.dev"),
    ],
)
def test_a_version_that_was_never_run_is_warned_of(version: tuple[Any, ...], words: str) -> None:
    with pytest.warns(UserWarning, match=words):
        check_parents(version, ours(Parent))


@pytest.mark.parametrize("edge", [library("vllm").oldest, library("vllm").newest])
def test_tested_versions_are_not_warned_of(edge: str) -> None:
    check_parents((*map(int, edge.split(".")), 9), ours(Parent))
