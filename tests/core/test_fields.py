"""Fields of scorers and reducers: what they may not hold is refused, in words."""

from __future__ import annotations

from typing import Any

import pytest

from tokenprune import BudgetError, ShapeError, SpecError
from tokenprune.plugins import registry

REFUSED = [
    ("cls-attention", {"ensemble": "sum"}, "ensemble must be 'avg', 'max' or 'min', got 'sum'"),
    ("fastv", {"queries": "first"}, "queries must be 'last' or 'text', got 'first'"),
    ("fopru", {"mode": "column"}, "mode must be 'rank' or 'row', got 'column'"),
    ("fopru", {"columns": 0}, "columns must be an int >= 1 or None, got 0"),
    ("fopru", {"columns": True}, "columns must be an int >= 1 or None, got True"),
    ("random", {"seed": -1}, "seed must be an int >= 0, got -1"),
    ("similarity", {"pivots": 0}, "pivots must be an int >= 1, got 0"),
    ("similarity", {"pivots": True}, "pivots must be an int >= 1, got True"),
    ("similarity", {"pivots": 2.0}, "pivots must be an int >= 1, got 2.0"),
    ("kmeans", {"seed": "1"}, "seed must be an int >= 0, got '1'"),
    ("kmeans", {"iterations": -1}, "iterations must be an int >= 0, got -1"),
    ("kmeans", {"iterations": None}, "iterations must be an int >= 0, got None"),
    ("important-diverse", {"important": 1.5}, "important is a share in [0, 1], got 1.5"),
    ("important-diverse", {"important": True}, "important is a share in [0, 1], got True"),
    ("important-diverse", {"important": "half"}, "important is a share in [0, 1], got 'half'"),
    ("important-diverse", {"step": 0}, "step must be an int >= 1, got 0"),
    ("important-diverse", {"step": True}, "step must be an int >= 1, got True"),
    ("important-diverse", {"step": 1.0}, "step must be an int >= 1, got 1.0"),
    ("pool", {"grid": 3}, "grid must be (rows, columns), got 3"),
    ("pool", {"grid": (1, 2, 3)}, "grid must be (rows, columns), got (1, 2, 3)"),
    ("pool", {"grid": (1, True)}, "grid must be (rows, columns), got (1, True)"),
    ("pool", {"grid": (1, 2.0)}, "grid must be (rows, columns), got (1, 2.0)"),
    ("pool", {"grid": (0, 2)}, "grid must have at least one row and column, got (0, 2)"),
    ("tome", {"metric": "values"}, "metric must be 'features' or 'keys', got 'values'"),
    ("diverse", {"metric": "values"}, "metric must be 'features' or 'keys', got 'values'"),
    ("prumerge", {"heads": "max"}, "heads must be 'joint' or 'mean', got 'max'"),
    ("prumerge", {"neighbours": -1}, "neighbours must be an int >= 0, got -1"),
    (
        "tome",
        {"layer": -3},
        "layer=-3 has no effect: metric='features' reads no keys; leave it out, or say "
        "metric='keys'",
    ),
    (
        "fopru",
        {"columns": 24},
        "columns=24 has no effect: mode='rank' has no rows; leave it out, or say mode='row'",
    ),
    ("prumerge", {"keep": 0}, "keep must be at least 1: merging always leaves the extra token"),
]


@pytest.mark.parametrize(("name", "fields", "message"), REFUSED)
def test_a_field_is_refused(name: str, fields: dict[str, Any], message: str) -> None:
    known = registry()
    steps = {offer.plugin.name: offer.plugin for offer in (*known.scorers, *known.reducers)}
    keep = {"keep": 4} if name in {offer.plugin.name for offer in known.reducers} else {}
    with pytest.raises((SpecError, BudgetError)) as caught:
        steps[name].factory(**{**keep, **fields})
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["cls-attention", "received-attention", "fopru"])
def test_layers_given_as_a_list_become_a_tuple(name: str) -> None:
    """Steps are values: they are hashed, and equal ones are one."""
    step = {offer.plugin.name: offer.plugin for offer in registry().scorers}[name]
    made = step.factory(layers=[-3, -1])
    assert made.layers == (-3, -1)
    assert hash(made) == hash(step.factory(layers=(-3, -1)))
    with pytest.raises(ShapeError, match="layers=K takes the K last layers"):
        step.factory(layers=0)


def test_a_grid_given_as_a_list_becomes_a_tuple() -> None:
    step = {offer.plugin.name: offer.plugin for offer in registry().reducers}["pool"]
    assert step.factory(4, grid=[2, 3]).grid == (2, 3)
    assert hash(step.factory(4, grid=[2, 3])) == hash(step.factory(4, grid=(2, 3)))


@pytest.mark.parametrize("share", [0, 0.0, 1, 1.0])
def test_a_share_may_be_all_or_nothing(share: float) -> None:
    step = {offer.plugin.name: offer.plugin for offer in registry().reducers}["important-diverse"]
    assert step.factory(4, important=share).important == share
