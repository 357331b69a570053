"""Tuning finds a spec by agreement alone, and says what it can vouch for."""

import dataclasses

import pytest

from tokenprune import parse
from tokenprune.bench import DataError, Sample, pocket, tuning
from tokenprune.bench.lower_bound import lower_bound, trials_needed
from tokenprune.bench.rounds import Record
from tokenprune.bench.tuning import tune


@pytest.fixture(scope="module")
def prompts():
    """A hundred questions without their answers."""
    return [dataclasses.replace(one, answers=()) for one in pocket()[::3]]


def options(**changes):
    return {"cost": "tokens", "batch": 50, "max_new_tokens": 1, "keeps": (0.75, 0.25)} | changes


@pytest.fixture(scope="module")
def tuned(shipped, prompts):
    return tune(*shipped, prompts, floor=0.6, specs=["random", "pool({keep})"], **options())


def test_the_best_is_the_cheapest_that_was_confirmed(tuned):
    assert tuned.best is not None
    assert parse(tuned.best.spec)
    passed = [trial for trial in tuned.confirmed if trial.bound >= 0.6]
    assert tuned.best.tokens == min(trial.tokens for trial in passed) < 64
    assert tuned.vanilla.agreement == 1


def test_bounds_hold_for_all_confirmations_together(tuned):
    for trial in tuned.confirmed:
        assert trial.bound == lower_bound(trial.agreeing, trial.pictures, 1 - 0.05 / 3)
        assert trial.bound < trial.agreement


def test_the_search_and_the_confirmation_share_no_picture(tuned, prompts):
    pictures = len({one.group for one in prompts})
    assert tuned.searched[0].pictures + tuned.confirmed[0].pictures == pictures


def test_the_search_stops_where_a_method_has_failed(shipped, prompts):
    keeps = (0.9, 0.06, 0.03)
    tuned = tune(*shipped, prompts, floor=0.8, specs=["random"], **options(keeps=keeps))
    assert [trial.spec.partition(")")[0] for trial in tuned.searched] == [
        "random | evict(0.9",
        "random | evict(0.06",
    ]


def test_nothing_is_found_where_nothing_reaches_the_floor(shipped, prompts):
    tuned = tune(*shipped, prompts, floor=0.9, specs=["random"], **options(keeps=(0.06,)))
    assert tuned.best is None
    assert tuned.confirmed == ()


def test_methods_that_the_model_cannot_serve_are_named(shipped, prompts):
    specs = ["pool-attention | evict({keep})", "uniform"]
    tuned = tune(*shipped, prompts, floor=0.8, specs=specs, **options())
    assert "PoolAttention" in tuned.skipped["pool-attention | evict({keep})"]
    assert {trial.spec.partition(" ")[0] for trial in tuned.searched} == {"uniform"}


def test_a_floor_that_cannot_be_shown_is_refused(shipped, prompts):
    with pytest.raises(DataError, match=r"\d+ pictures cannot show 0.99 .* takes 816") as refused:
        tune(*shipped, prompts, floor=0.99)
    highest = float(str(refused.value).rpartition(" ")[2])
    half, level = len({one.group for one in prompts}) // 2, 1 - 0.05 / 3
    assert trials_needed(highest, level) <= half < trials_needed(highest + 0.001, level)
    with pytest.raises(DataError, match="floor must be between 0 and 1"):
        tune(*shipped, prompts, floor=1.0)
    for confidence in (0.0, 1.0, 1.5):
        with pytest.raises(DataError, match="confidence must be between 0 and 1"):
            tune(*shipped, prompts, floor=0.6, confidence=confidence)


@pytest.mark.parametrize(("seconds", "found"), [(0.5, True), (2.0, False)])
def test_what_is_slower_than_the_unpruned_model_is_not_the_best(monkeypatch, seconds, found):
    def ask(model, processor, part, entrants, **options):
        return [
            Record(["yes"] * len(part), total=[seconds if one.stages else 1.0], depth=1)
            for one in entrants
        ]

    monkeypatch.setattr(tuning, "ask", ask)
    samples = [Sample(str(n), "", "q") for n in range(40)]
    tuned = tune(None, None, samples, floor=0.6, specs=["random"], keeps=[0.5], text=str)
    assert tuned.confirmed[0].bound > 0.6
    assert (tuned.best is not None) == found
