"""Who competes: budgets put into specs, and floors beside every method."""

import pytest
import torch

from tokenprune import Signals, SpecError, VisualTokens, parse, spec_of
from tokenprune.bench.entrants import Given, Inverted, adjustable, enter, with_budget
from tokenprune.errors import BudgetError, UnknownNameError
from tokenprune.scorers import RandomScorer


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("vtc-cls", "cls-attention | evict(0.25) @ before-llm"),
        ("vtc-cls(keep=7, layers=1)", "cls-attention(layers=1) | evict(0.25) @ before-llm"),
        ("fastv", "fastv | evict(0.25) @ after-layer"),
        ("pool(9) @ after-layer(3)", "pool(0.25) @ after-layer(3)"),
        ("prumerge", "prumerge(keep=0.25) @ before-llm"),
        ("random | evict({keep}) | tome(2)", "random | evict(0.25) | tome(2) @ before-llm"),
        ("fastervlm", "cls-attention(layers=1) | evict(0.25, per='crop') @ before-llm"),
    ],
)
def test_budgets_are_put_in(spec, expected):
    (stage,) = with_budget(spec, 0.25)
    assert spec_of(stage) == spec_of(parse(expected))


def test_schedules_stand_as_they_are():
    assert not adjustable("pyramiddrop")
    assert not adjustable("random | evict(9) | tome(4)")
    entrants = enter(["pyramiddrop"], [0.5, 0.25])
    assert len([one for one in entrants if one.kind == "method"]) == 1
    assert len([one for one in entrants if one.label == "random"]) == 2


def test_floors_and_controls_stand_beside_every_method_and_placement():
    entrants = enter(["vtc-cls", "fastv"], [1.0, 0.5, 7], Given())
    assert [one.label for one in entrants[:2]] == ["vanilla", "blind"]
    assert entrants[0].stages == entrants[1].stages == ()
    assert entrants[1].blind
    for keep in (0.5, 7):
        beside = {one.spec for one in entrants if one.keep == keep}
        assert beside == {
            f"{steps} @ {place}"
            for steps in (
                f"random | evict({keep})",
                f"uniform | evict({keep})",
                f"pool({keep})",
                f"inverted(cls-attention) | evict({keep})",
                f"oracle | evict({keep})",
            )
            for place in ("before-llm", "after-layer")
        } | {
            f"cls-attention | evict({keep}) @ before-llm",
            f"fastv | evict({keep}) @ after-layer",
        }


@pytest.mark.parametrize("keeps", [(1, 1.0), (1.0, 1)])
def test_one_token_is_not_all_of_them(keeps):
    entrants = enter(["vtc-cls"], keeps)
    (method,) = [one for one in entrants if one.kind == "method"]
    assert spec_of(method.stages[0].strategy) == "cls-attention | evict(1)"


def test_inverted_scores_are_those_of_a_method_that_works_there():
    """FastV has no scores before the LLM, whichever method is named first."""
    entrants = enter(["fastv", "tome({keep}); fastv({keep})", "vtc-cls"], [0.5])
    inverted = {one.label: one.spec for one in entrants if one.label.startswith("inverted")}
    assert inverted == {
        "inverted": "inverted(cls-attention) | evict(0.5) @ before-llm",
        "inverted @ after-layer": "inverted(fastv) | evict(0.5) @ after-layer",
    }


def test_floors_have_budgets_for_what_the_method_has_them_for():
    entrants = enter(["fastervlm", "vtc-cls"], [8])
    floors = {one.label: (one.spec, one.per) for one in entrants if one.label.startswith("random")}
    assert floors == {
        "random per crop": ("random | evict(8, per='crop') @ before-llm", "crop"),
        "random": ("random | evict(8) @ before-llm", "image"),
    }


def test_floors_run_even_without_a_method():
    labels = [one.label for one in enter([], [0.5])]
    assert labels == ["vanilla", "blind", "random", "uniform", "pool", "inverted"]


@pytest.mark.parametrize(
    ("spec", "keep", "error"),
    [
        ("nothing", 0.5, UnknownNameError),
        ("cls-attention", 0.5, SpecError),
        ("vtc-cls", 1.5, BudgetError),
    ],
)
def test_what_cannot_work_is_refused(spec, keep, error):
    with pytest.raises(error):
        enter([spec], [keep])


def tokens(batch, count):
    features = torch.randn(batch, count, 4, generator=torch.Generator().manual_seed(0))
    return VisualTokens.of(features)


def test_inverted_scores_rank_the_other_way_round():
    given, scorer = tokens(2, 9), RandomScorer(seed=3)
    scores = scorer.score(given, Signals())
    inverted = Inverted(scorer).score(given, Signals())
    assert torch.equal(inverted.argsort(1), scores.argsort(1).flip(1))


def test_given_scores_follow_the_patches_that_are_left():
    given = Given([torch.tensor([0.0, 1, 2, 3]), torch.tensor([3.0, 2, 1, 0])])
    assert given.score(tokens(2, 4), Signals()).tolist() == [[0, 1, 2, 3], [3, 2, 1, 0]]
    with pytest.raises(SpecError, match="scores of 2 pictures, but 3 came"):
        given.score(tokens(3, 4), Signals())
