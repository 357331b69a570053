"""Means and their errors against what resampling and counting say."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenprune.bench.lower_bound import lower_bound, trials_needed
from tokenprune.bench.match import credit, plain
from tokenprune.bench.scoring import balanced, f1, mean


def test_the_error_of_independent_values_is_the_textbook_one():
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    found = mean(values, [str(n) for n in range(7)])
    variance = sum((v - found.value) ** 2 for v in values) / 6
    assert found.error == pytest.approx(math.sqrt(variance / 7))


def test_questions_repeated_about_a_picture_are_no_new_evidence():
    values, groups = [0.0, 1.0, 1.0, 0.0, 1.0], ["a", "b", "c", "d", "e"]
    assert mean(values * 4, groups * 4).error == pytest.approx(mean(values, groups).error)


def test_clustered_error_agrees_with_a_bootstrap_over_pictures():
    rng = random.Random(0)
    groups, types, values = [], [], []
    for picture in range(60):
        skill = rng.random()
        for kind in ("colour", "kind", "count")[: rng.randrange(1, 4)]:
            groups.append(str(picture))
            types.append(kind)
            values.append(float(rng.random() < skill))
    by_picture = {g: [i for i, h in enumerate(groups) if h == g] for g in set(groups)}
    means = []
    for _ in range(600):
        chosen = [i for g in rng.choices(sorted(by_picture), k=60) for i in by_picture[g]]
        names = sorted({types[i] for i in chosen})
        each = []
        for name in names:
            of_type = [values[i] for i in chosen if types[i] == name]
            each.append(sum(of_type) / len(of_type))
        means.append(sum(each) / len(each))
    centre = sum(means) / len(means)
    spread = math.sqrt(sum((m - centre) ** 2 for m in means) / (len(means) - 1))
    assert balanced(values, types, groups).error == pytest.approx(spread, rel=0.15)


def test_types_weigh_the_same_however_many_questions_they_have():
    found = balanced([1.0] * 9 + [0.0], ["a"] * 9 + ["b"], list("0123456789"))
    assert found.value == pytest.approx(0.5)


def test_one_picture_has_no_error():
    assert math.isnan(mean([1.0, 0.0], ["a", "a"]).error)


def test_a_type_of_one_picture_has_no_error_and_so_has_the_mean_over_types():
    types, groups = ["a", "b", "b"], ["p", "p", "q"]
    assert math.isnan(balanced([1.0, 0.0, 1.0], types, groups).error)
    assert balanced([1.0, 1.0, 0.0, 1.0], [*types, "a"], [*groups, "q"]).error > 0


def test_nothing_to_average_is_refused():
    with pytest.raises(ValueError, match="one group for each value"):
        mean([], [])


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_f1_is_the_harmonic_mean_of_precision_and_recall(pairs):
    replies, truths = [r for r, _ in pairs], [t for _, t in pairs]
    hits = sum(r and t for r, t in pairs)
    if not hits:
        found = f1(replies, truths)
        assert found == 0 or math.isnan(found)
        return
    precision, recall = hits / sum(replies), hits / sum(truths)
    expected = 2 * precision * recall / (precision + recall)
    assert f1(replies, truths) == pytest.approx(expected)


@given(st.integers(1, 200), st.data())
def test_at_the_bound_so_many_successes_are_just_improbable(trials, data):
    successes = data.draw(st.integers(1, trials))
    bound = lower_bound(successes, trials, 0.95)
    tail = sum(
        math.comb(trials, k) * bound**k * (1 - bound) ** (trials - k)
        for k in range(successes, trials + 1)
    )
    assert tail == pytest.approx(0.05, rel=1e-6)


def test_no_success_bounds_nothing():
    assert lower_bound(0, 10, 0.95) == 0.0


@pytest.mark.parametrize("floor", [0.5, 0.9, 0.99])
def test_trials_needed_are_the_fewest(floor):
    needed = trials_needed(floor, 0.95)
    assert lower_bound(needed, needed, 0.95) >= floor
    assert lower_bound(needed - 1, needed - 1, 0.95) < floor


@pytest.mark.parametrize(
    ("reply", "answers", "expected"),
    [
        ("Yes.", ["yes"], 1.0),
        ("the top-left", ["top-left"], 1.0),
        ("yes it is", ["yes"], 0.0),
        ("", ["yes"], 0.0),
        ("cat", ["cat"] * 2 + ["dog"] * 8, 2 / 3),
        ("dog", ["cat"] * 2 + ["dog"] * 8, 1.0),
        ("fish", ["cat"] * 2 + ["dog"] * 8, 0.0),
    ],
)
def test_credit(reply, answers, expected):
    assert credit(reply, answers) == pytest.approx(expected)


def test_words_that_look_like_articles_stay():
    assert plain("Theatre an answer") == "theatre answer"


@pytest.mark.parametrize(
    ("reply", "expected"), [("A", 1.0), ("(a).", 1.0), ("", 0.0), ("The", 0.0), ("...", 0.0)]
)
def test_the_option_a_is_no_article(reply, expected):
    assert credit(reply, ["A"]) == expected
