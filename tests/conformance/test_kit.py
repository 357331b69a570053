"""What the kit itself promises: strict expectations, honest opt-outs, documentation, generators."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from tokenprune import ClsAttentionScorer, Evict, RandomScorer, Signal, UniformScorer, parse
from tokenprune.errors import SpecError
from tokenprune.testing import (
    CHECKS,
    ReducerCase,
    ScorerCase,
    budgets,
    inputs_for,
    parameters,
    plans,
    register_signal,
    scores_for,
    signals_for,
    visual_tokens,
)
from tokenprune.testing.__main__ import lines
from tokenprune.testing.generators import _registered, attention_rows

from .gallery import KeepsTheLowest

ROOT = Path(__file__).parents[2]
QUICK = settings(database=None, suppress_health_check=list(HealthCheck))


# Expectations and opt-outs ----------------------------------------


def marks(case, number):
    (parameter,) = [p for p in parameters([case]) if p.values[1].number == number]
    return parameter.marks


def test_expected_failures_are_strict():
    case = ReducerCase(KeepsTheLowest(keep=4), expected_failures={"P8": "wrong on purpose"})
    (mark,) = marks(case, "P8")
    assert mark.name == "xfail"
    assert mark.kwargs == {"strict": True, "reason": "wrong on purpose"}
    assert not marks(case, "P1")


SUITE = """
from hypothesis import settings
from tokenprune import UniformScorer
from tokenprune.testing import ScorerCase, parametrize_with_checks

settings.register_profile("few", max_examples=5)
settings.load_profile("few")

@parametrize_with_checks([ScorerCase(UniformScorer(), expected_failures={"S1": "no"})])
def test_contract(case, check):
    check(case)
"""


def test_an_expected_failure_that_passes_fails(tmp_path):
    (tmp_path / "test_it.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "XPASS(strict)" in done.stdout
    assert "1 failed, 8 passed, 1 skipped" in done.stdout


def test_opt_outs_are_skipped_with_their_reason():
    (mark,) = marks(ScorerCase(UniformScorer()), "S5")
    assert mark.name == "skip"
    assert "place of a token" in mark.kwargs["reason"]


@pytest.mark.parametrize(
    ("exempt", "message"),
    [
        ({"S3": "rows know each other"}, "opts out of S3, which every strategy must keep"),
        ({"P1": "not a reducer"}, "names 'P1'; its promises are S1, S2"),
        ({"S5": " "}, "gives no reason for S5"),
    ],
)
def test_opt_outs_are_checked(exempt, message):
    @dataclass(frozen=True)
    class Stubborn(RandomScorer):
        pass

    Stubborn.exempt = exempt
    with pytest.raises(SpecError, match=message):
        parameters([Stubborn()])


def test_subjects_may_be_classes_and_get_a_budget():
    names = {parameter.values[0].name for parameter in parameters([Evict, RandomScorer])}
    assert names == {"evict(4)", "random"}


def test_what_cannot_be_checked_is_refused():
    with pytest.raises(SpecError, match="checks are for scorers, reducers"):
        parameters([parse("random | evict(3)")])
    with pytest.raises(SpecError, match="cannot be made with default arguments"):
        parameters([ReducerCase])


# The contract ----------------------------------------


def test_numbers_have_no_gaps():
    numbers = {"S": 10, "P": 19, "T": 6, "M": 15}
    assert set(CHECKS) == {f"{a}{n}" for a, last in numbers.items() for n in range(1, last + 1)}


def test_the_documentation_states_the_contract():
    page = (ROOT / "docs" / "contract.md").read_text()
    promises = "\n".join(lines())
    assert promises in page, (
        f"docs/contract.md must say (python -m tokenprune.testing):\n{promises}"
    )
    assert set(re.findall(r"^- \*\*([SPTM]\d+)\*\*", promises, re.M)) == set(CHECKS)


# Generators: what they must be able to draw ----------------------------------------


@pytest.mark.parametrize(
    "wanted",
    [
        lambda t: t.lengths == (1,),
        lambda t: min(t.lengths) == 1 < max(t.lengths),
        lambda t: bool(~t.mask[0, 0] & t.mask[0, -1]) and len(t.lengths) > 1,  # left
        lambda t: bool(t.mask[0, 0] & ~t.mask[0, -1]),  # right
        lambda t: bool((t.mask[0, :-2] & ~t.mask[0, 1:-1] & t.mask[0, 2:]).any()),  # in between
        lambda t: bool(t.features.isnan().any()),
        lambda t: bool((t.features[t.mask] == 0).all(-1).any()),
        lambda t: len(t.features[t.mask].unique(dim=0)) < int(t.mask.sum()),
        lambda t: float(t.features[t.mask].abs().max()) > 1e11,
        lambda t: 0 < float(t.features[t.mask].abs().max()) < 1e-9,
        lambda t: t.features.dtype == torch.float16,
        lambda t: 0 < sum(t.protected_lengths) < sum(t.lengths),
        lambda t: t.protected_lengths == t.lengths,
        lambda t: float(t.sizes[t.mask].max()) > 1,
        lambda t: int(t.patches.max()) > t.mask.shape[1],
    ],
    ids=[
        "one token", "ragged", "left", "right", "between", "junk", "zero", "duplicate", "huge",
        "tiny", "half", "protected", "all protected", "sizes", "gaps",
    ],
)  # fmt: skip
def test_visual_tokens_draw_on_purpose(wanted):
    find(visual_tokens(), wanted, settings=settings(QUICK, max_examples=2000), random=_random())


def _random():
    import random

    return random.Random(0)


def test_visual_tokens_shrink_to_one_zero():
    smallest = find(visual_tokens(), lambda t: True, settings=QUICK)
    assert smallest.features.tolist() == [[[0.0]]]
    assert smallest.lengths == (1,)
    assert smallest.protected_lengths == (0,)


def test_scores_draw_ties_and_infinities():
    tokens = find(
        visual_tokens(), lambda t: t.lengths == (3,), settings=settings(QUICK, max_examples=5000)
    )
    scores = scores_for(tokens, infinite=True)
    find(scores, lambda s: len(s[tokens.mask].unique()) == 2, settings=QUICK)
    find(scores, lambda s: bool((s[tokens.mask] == -torch.inf).any()), settings=QUICK)
    with pytest.raises(NoSuchExample):
        find(scores_for(tokens), lambda s: bool(s[tokens.mask].isinf().any()), settings=QUICK)


@given(budgets())
def test_budgets_are_legal(keep):
    Evict(keep)


@given(plans())
def test_plans_are_plans(plan):
    assert min(plan.lengths) >= 1
    if plan.members is not None:
        sums = plan.dense().sum(-1)[plan.mask]
        assert torch.allclose(sums, torch.ones_like(sums))


@given(inputs_for(ClsAttentionScorer(layers=2)))
def test_attention_rows_are_rows_of_a_softmax(inputs):
    (rows,) = inputs.signals.values()
    mask = inputs.tokens.mask[:, None, None].expand(rows.shape)
    assert rows.shape[1] == 2
    assert bool((rows[mask] >= 0).all())
    assert float(rows.float().masked_fill(~mask, 0).sum(-1).max()) <= 1 + 1e-2  # of bfloat16


@dataclass(frozen=True)
class Depth(Signal):
    """A signal of a third party."""

    axes: ClassVar[str] = "tokens batch bins"


class DepthScorer(RandomScorer):
    @property
    def signals(self):
        return frozenset({Depth()})


@given(st.data())
def test_signals_of_third_parties_are_drawn_by_their_axes(data):
    tokens = data.draw(visual_tokens())
    answer = data.draw(signals_for(DepthScorer(), tokens))[Depth()]
    assert answer.shape[:2] == tokens.mask.T.shape


def test_third_parties_say_what_their_signals_look_like():
    try:
        register_signal(
            Depth, lambda signal, tokens: st.just(torch.full((*tokens.mask.T.shape, 1), 7.0))
        )
        inputs = find(
            inputs_for(DepthScorer()), lambda i: bool(i.tokens.mask.all()), settings=QUICK
        )
        assert inputs.signals[Depth()].unique().tolist() == [7.0]
    finally:
        del _registered[Depth]
    assert attention_rows in _registered.values()
