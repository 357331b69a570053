"""Failures that an author can use: what was promised, what was seen, and what it probably is."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from tokenprune import (
    ClsAttention,
    Evict,
    RandomScorer,
    Scorer,
    Signals,
    SpecError,
    UnknownNameError,
    VisualTokens,
)
from tokenprune.testing import CHECKS, run_check

from .gallery.scorers import FirstMaskForAll, NormalisedOverPadding
from .test_builtin_adapters import towers
from .test_gallery import registered


def message(number: str, subject: object) -> str:
    with pytest.raises(AssertionError) as caught:
        run_check(number, subject)  # type: ignore[arg-type]
    return "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])


def test_a_failure_begins_with_the_promise() -> None:
    said = message("S4", NormalisedOverPadding())
    assert said.startswith(
        "S4 is broken: Padding does not change the scores of real tokens, wherever it is and "
        "whatever it holds.\n"
    )


@dataclass(frozen=True)
class Undeclared(Scorer):
    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        return signals[ClsAttention(layers=1)].mean((1, 2))


SUITE = """
from dataclasses import dataclass
from tokenprune import ClsAttention, Scorer
from tokenprune.testing import parametrize_with_checks

@dataclass(frozen=True)
class Undeclared(Scorer):
    def score(self, tokens, signals):
        return signals[ClsAttention(layers=1)].mean((1, 2))

@parametrize_with_checks([Undeclared()])
def test_contract(case, check):
    check(case)
"""


def test_an_undeclared_signal_is_one_failure(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert f"1 failed, {len([n for n in CHECKS if n[0] == 'S']) - 1} skipped" in done.stdout
    assert "S7 is broken" in done.stdout
    assert "ClsAttention(layers=1) was not supplied" in done.stdout
    with pytest.raises(AssertionError, match="S3 cannot be looked at: .*which S7 tells"):
        run_check("S3", Undeclared())


@pytest.mark.parametrize(
    ("number", "subject", "error", "words"),
    [
        (
            "S99",
            RandomScorer(),
            UnknownNameError,
            "no promise has the number 'S99'; there are S1",
        ),
        ("P3", RandomScorer(), SpecError, "P3 is a promise for a ReducerCase, not for random, of"),
        ("S3", Evict(4), SpecError, r"S3 is a promise for a ScorerCase, not for evict\(4\)"),
        ("S3", 3, SpecError, "checks are for scorers, reducers, TowerCase and ModelCase objects"),
        (
            "S3",
            "random",
            SpecError,
            "checks are for scorers, reducers, TowerCase and ModelCase obj",
        ),
    ],
)
def test_a_check_of_something_else_says_so(
    number: str, subject: object, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        run_check(number, subject)  # type: ignore[arg-type]


def test_numbers_are_listed_in_order() -> None:
    with pytest.raises(UnknownNameError, match="S9, S10, P1, P2, .*P10, .*T1, .*M1, "):
        run_check("nothing", RandomScorer())


def test_values_of_signals_can_be_pasted() -> None:
    signals = Signals({ClsAttention(layers=1): torch.tensor([[[[0.25, 0.5]]]])})
    pasted = eval(repr(signals), {"tensor": torch.tensor, **globals()})
    assert torch.equal(pasted[ClsAttention(layers=1)], signals[ClsAttention(layers=1)])
    whole = Signals({ClsAttention(layers=3): torch.rand(1, 3, 16, 576)})
    assert repr(whole) == "Signals({ClsAttention(layers=3): <float32 (1, 3, 16, 576)>})"


def test_batches_shrink_to_what_matters() -> None:
    """Two rows of different length, and nothing else that is not needed."""
    before = settings.get_current_profile_name()
    settings.register_profile("shrinks", database=None, derandomize=True)
    settings.load_profile("shrinks")
    try:
        said = message("S3", FirstMaskForAll())
    finally:
        settings.load_profile(before)
    inputs = said[said.index("Inputs(") :]
    assert inputs.count("True") + inputs.count("False") < 20
    assert "protected=tensor([[False" in inputs
    assert "True" not in inputs[inputs.index("protected") :]
    assert "nan" not in inputs[: inputs.index("mask")]


def shown(name: str) -> str:
    from .gallery import FAULTS

    fault = next(each for each in FAULTS if each.name == name)
    with registered(fault):
        return message(fault.number, fault.subject)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ShiftedRows", "it equals the oracle shifted"),
        ("ScaleLeftOut", "is the scale of the attention left out?"),
        ("LayersBackwards", "it equals the oracle backwards along axis 1"),
        ("RegisterForPatch", "make no grid on pictures of 16 x 16; are [CLS] or registers among"),
        ("ForgetsIds", "give VisualTokens ids, as ids_of of tokenprune_adapters.kit does"),
        ("NeverTellsBytes", "call record.cached(stored, vanilla) after the prefill"),
        ("WorksOnTheHost", "Tensor.cpu brings values to the host"),
        ("SortsUnstably", "sort with stable=True"),
    ],
)
def test_a_failure_says_what_it_probably_is(name: str, words: str) -> None:
    assert words in shown(name)


def test_what_was_not_checked_is_told() -> None:
    clip = replace(next(iter(towers())), oracle=None)
    with pytest.warns(UserWarning, match=r"no oracle for Keys\(layer=-2\): only ranges were check"):
        run_check("T5", clip)
    packed = next(each for each in towers() if each.name == "SigLIP2")
    with pytest.warns(UserWarning, match="SigLIP2: where patches are was not checked"):
        run_check("T4", packed)
