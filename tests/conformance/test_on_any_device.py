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
from torch import Tensor

from tokenprune import (
    Diverse,
    DominantContextual,
    FoPruScorer,
    ImportantDiverse,
    Plan,
    Pool,
    PruMerge,
    PruMergePlus,
    RelevanceScorer,
    ToMe,
    VisualTokens,
)
from tokenprune.plugins import CORE, registry
from tokenprune.testing import (
    ReducerCase,
    ScorerCase,
    budgets,
    inputs_for,
    plans,
    run_check,
    visual_tokens,
)
from tokenprune.testing.cases import cases_of
from tokenprune.testing.inputs import same_bits

VARIANTS = [
    ScorerCase(FoPruScorer("row")),
    ScorerCase(FoPruScorer("row", columns=2)),
    ScorerCase(RelevanceScorer(negate=True)),
    ReducerCase(ToMe(4, metric="keys")),
    ReducerCase(Diverse(4, metric="keys")),
    ReducerCase(DominantContextual(4, contextual=0.5, normalize=False)),
    ReducerCase(DominantContextual(4, contextual=2, metric="features")),
    ReducerCase(ImportantDiverse(4, important=0.25, step=1)),
    ReducerCase(PruMerge(4, heads="mean", normalize=True)),
    ReducerCase(PruMergePlus(4, heads="mean")),
    ReducerCase(PruMerge()),
    ReducerCase(PruMergePlus()),
    ReducerCase(Pool(4, grid=(2, 3))),
]
"""Branches that the defaults of our strategies don't take."""


@pytest.mark.parametrize("case", VARIANTS, ids=lambda case: case.name)
def test_branches_work_where_their_inputs_are(case: ScorerCase | ReducerCase) -> None:
    """What the contract asks of the defaults."""
    run_check("S9" if isinstance(case, ScorerCase) else "P16", case)


def reducers() -> list[ReducerCase]:
    """Ours with their defaults, and the branches."""
    ours = [offer.plugin.factory for offer in registry().reducers if offer.origin == CORE]
    made = [*(case for factory in ours for case in cases_of(factory)), *VARIANTS]
    return [case for case in made if isinstance(case, ReducerCase)]


every_reducer = pytest.mark.parametrize("case", reducers(), ids=lambda case: case.name)


@every_reducer
@given(data=st.data())
def test_plans_know_their_lengths(case: ReducerCase, data: st.DataObject) -> None:
    inputs, keep = data.draw(inputs_for(case.reducer)), data.draw(budgets())
    plan = case.plan(inputs, keep)
    counted = tuple(int(row.sum()) for row in plan.mask)
    assert vars(plan)["lengths"] == counted


@every_reducer
@given(data=st.data())
def test_a_budget_asks_the_device_for_no_lengths(case: ReducerCase, data: st.DataObject) -> None:
    """To ask is to wait for all that the device still has to do."""
    if not case.budgeted:
        pytest.skip("the picture decides how many stay")
    inputs, keep = data.draw(inputs_for(case.reducer)), data.draw(budgets())
    known = inputs.tokens.lengths, inputs.tokens.protected_lengths

    def ask(tensor: Tensor) -> None:
        raise AssertionError(f"numbers were asked for, though {known} are known")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "tolist", ask)
        case.plan(inputs, keep)


@given(tokens=visual_tokens(), data=st.data())
def test_plans_work_where_their_tensors_are(tokens: VisualTokens, data: st.DataObject) -> None:
    plan = data.draw(plans(tokens))
    after = data.draw(plans(tokens.reduce(plan)))
    for call in (plan.dense, plan.source, lambda: plan.then(after).dense()):
        assert same_bits(_elsewhere(call), call())
    groups = plan.source().masked_fill(~tokens.mask, -1)
    again = _elsewhere(partial(Plan.group, groups, tokens.sizes))
    assert same_bits(again.dense(), Plan.group(groups, tokens.sizes).dense())
    both = plan.then(after)
    assert vars(both)["lengths"] is after.lengths


def _elsewhere(call: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return call()
