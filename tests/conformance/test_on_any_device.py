"""What cannot be seen without an accelerator: steps make tensors where their inputs are, and plans
know their lengths without asking the device.

While `meta` is the default device, a tensor made without saying where cannot meet one on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenprune.plugins import registry
from tokenprune.testing import ReducerCase, ScorerCase, budgets, inputs_for
from tokenprune.testing.cases import cases_of
from tokenprune.testing.inputs import same_bits

CPU = torch.device("cpu")


def cases(kind: type[Any]) -> Callable[[Any], Any]:
    known = registry()
    steps = [*known.scorers, *known.reducers]
    ours = [offer.plugin.factory for offer in steps if offer.origin == "tokenprune"]
    made = [case for factory in ours for case in cases_of(factory) if isinstance(case, kind)]
    assert made
    return pytest.mark.parametrize("case", made, ids=lambda case: case.name)


@cases(ScorerCase)
@given(data=st.data())
def test_scorers_work_where_their_inputs_are(case: ScorerCase, data: st.DataObject) -> None:
    inputs = data.draw(inputs_for(case.scorer))
    expected = case.scorer.score(inputs.tokens, inputs.signals)
    got = _elsewhere(partial(case.scorer.score, inputs.tokens, inputs.signals))
    assert got.device == CPU
    assert same_bits(got, expected)


@cases(ReducerCase)
@given(data=st.data())
def test_reducers_work_where_their_inputs_are(case: ReducerCase, data: st.DataObject) -> None:
    inputs, keep = data.draw(inputs_for(case.reducer)), data.draw(budgets())
    expected = case.plan(inputs, keep)
    got = _elsewhere(partial(case.plan, inputs, keep))
    assert got.anchors.device == CPU
    assert torch.equal(got.anchors, expected.anchors)
    applied = _elsewhere(partial(got, inputs.tokens.features))
    assert same_bits(applied, expected(inputs.tokens.features))


@cases(ReducerCase)
@given(data=st.data())
def test_plans_know_their_lengths(case: ReducerCase, data: st.DataObject) -> None:
    inputs, keep = data.draw(inputs_for(case.reducer)), data.draw(budgets())
    plan = case.plan(inputs, keep)
    counted = tuple(int(row.sum()) for row in plan.mask)
    assert vars(plan)["lengths"] == counted


def _elsewhere(call: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return call()
