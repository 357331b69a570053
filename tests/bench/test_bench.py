"""What a bench says is what one gets by asking oneself."""

import dataclasses
import json

import pytest

import tokenprune
from support.llava import tiny_llava
from tokenprune.bench import DataError, bench, pocket
from tokenprune.bench import rounds as bench_rounds
from tokenprune.bench.data import Sample
from tokenprune.bench.entrants import enter
from tokenprune.bench.plots import plot
from tokenprune.bench.result import rows
from tokenprune.bench.rounds import Record
from tokenprune.prompts import prompter

SPECS, KEEPS = ["vtc-cls", "fastv", "pyramiddrop(first=1, second=2, third=3)"], [1.0, 0.25, 4]


@pytest.fixture(scope="module")
def samples():
    return pocket()[::15]


@pytest.fixture(scope="module")
def result(shipped, samples):
    model, processor = shipped
    return bench(
        model,
        processor,
        samples,
        SPECS,
        KEEPS,
        batch=8,
        max_new_tokens=2,
        name="pocket",
        data="Pocket-VQA",
    )


def alone(shipped, sample, spec):
    """One reply, and the report, without any of the bench's code."""
    model, processor = shipped
    text = f"USER: <image> {sample.question} ASSISTANT:"
    inputs = processor(images=sample.image, text=text, return_tensors="pt")
    report = None
    if spec is None:
        output = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    else:
        with tokenprune.attach(model, spec) as pruned:
            output = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        report = pruned.report
    new = output[0, inputs["input_ids"].shape[1] :]
    return processor.decode(new, skip_special_tokens=True).strip(), report


def test_every_reply_is_that_of_the_spec_alone(shipped, samples, result):
    named = [row for row in result.rows if row.kind != "control"]
    assert len(named) == 1 + 2 * 2 + 1 + 2 * 6
    for row in named:
        said = {
            answer["id"]: answer["reply"]
            for answer in result.answers
            if (answer["label"], answer["spec"]) == (row.label, row.spec)
        }
        for sample in samples[::5]:
            reply, report = alone(shipped, sample, row.spec)
            assert said[sample.id] == reply
            if report is not None:
                assert row.tokens == report.layers
                assert row.kv_bytes_vanilla == pytest.approx(report.kv_bytes_vanilla, rel=0.1)


def test_accuracy_counts_right_answers(samples, result):
    for row in result.rows:
        answers = [a for a in result.answers if (a["label"], a["spec"]) == (row.label, row.spec)]
        answers = [a for a in answers if a["keep"] in (row.keep, 4)]
        assert len(answers) == len(samples)
        for kind, mean in row.types.items():
            of_type = [a["reply"] in a["answers"] for a in answers if a["type"] == kind]
            assert mean.value == pytest.approx(sum(of_type) / len(of_type))
        assert row.accuracy == pytest.approx(
            sum(mean.value for mean in row.types.values()) / len(row.types)
        )


def test_vanilla_agrees_with_itself_and_blind_with_nobody_in_particular(result):
    vanilla, blind = result.rows[:2]
    assert (vanilla.label, vanilla.agreement, vanilla.agreement_error) == ("vanilla", 1.0, 0.0)
    assert blind.label == "blind"
    assert blind.accuracy < vanilla.accuracy
    assert vanilla.tokens == blind.tokens == ((0, 64.0),)
    assert vanilla.kv_bytes == vanilla.kv_bytes_vanilla > 0


def test_budgets_are_fractions_of_what_there_is(result):
    assert {row.keep for row in result.rows} == {1.0, 0.5, 0.25, 4 / 64}


def test_times_are_those_of_a_question(result):
    for row in result.rows:
        assert 0 < row.first_token_ms <= row.total_ms
        assert (row.selector_ms > 0) == (row.spec is not None)


def test_inverted_scores_are_worse_than_the_scores(result):
    by = {(row.label, row.keep): row.accuracy for row in result.rows}
    assert by["inverted", 0.25] < by["vtc-cls", 0.25]


def test_files_hold_everything(result, tmp_path):
    result.write(tmp_path / "new" / "folder")
    written = json.loads((tmp_path / "new" / "folder" / "bench.json").read_text())
    assert written["format"] == 1
    assert len(written["rows"]) == len(result.rows)
    for row, told in zip(result.rows, written["rows"], strict=True):
        assert told["spec"] == row.spec
        assert told["accuracy"] == row.accuracy
        assert told["types"].keys() == row.types.keys()
    lines = (tmp_path / "new" / "folder" / "answers.jsonl").read_text().splitlines()
    assert len(lines) == len(result.answers)
    assert json.loads(lines[-1])["versions"] == result.versions == written["versions"]


def test_plots_are_pictures(result, tmp_path):
    from PIL import Image

    for path in plot(result, tmp_path):
        with Image.open(path) as picture:
            assert picture.size > (600, 400)
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 50


@pytest.mark.parametrize(("tower", "select"), [("clip", "default"), ("siglip", "full")])
def test_a_control_that_the_model_cannot_serve_is_left_out(monkeypatch, tower, select):
    """Nobody asked for [CLS] attention."""
    monkeypatch.setattr("tokenprune.bench.compete", lambda m, p, s, entrants, *_, **__: entrants)
    model = tiny_llava(tower=tower, select=select)
    entered = bench(model, None, [Sample("0", "", "q", ("yes",))], ["tome"], [0.5])
    labels = ["vanilla", "blind", "tome", "random", "uniform", "pool"]
    assert [one.label for one in entered] == labels + ["inverted"] * (tower == "clip")


def test_questions_without_answers_are_refused(shipped, samples):
    without = [dataclasses.replace(samples[0], answers=())]
    with pytest.raises(DataError, match="no answers to compare with"):
        bench(*shipped, without, ["vtc-cls"], [0.5])
    with pytest.raises(DataError, match="at least one question"):
        bench(*shipped, [], ["vtc-cls"], [0.5])


def told(entrants, right, held=None, crops=1):
    """Rows for replies of which the first so many are right, each about its own picture."""
    held = held or {}
    samples = [Sample(str(n), "", "q", ("yes",), group=str(n)) for n in range(100)]
    records = [
        Record(
            replies=["yes"] * count + ["no"] * (100 - count),
            first=[1.0],
            total=[1.0],
            layers={0: 100 * held.get(one.kind, 64)} if one.stages else {},
            pictures=100 * crops if one.stages else 0,
            before=6400 if one.stages else 0,
        )
        for one, count in zip(entrants, right, strict=True)
    ]
    return rows(samples, entrants, records)


@pytest.mark.parametrize(("method", "wins"), [(90, True), (61, False), (50, False)])
def test_a_method_must_beat_every_floor_beyond_the_error(method, wins):
    entrants = enter(["vtc-cls"], [0.5])
    right = {"vanilla": 95, "vtc-cls": method, "random": 40, "uniform": 60, "pool": 30}
    found = told(entrants, [right.get(one.label, 20) for one in entrants])
    by = {row.label: row.beats_floors for row in found}
    assert by.pop("vtc-cls") is wins
    assert set(by.values()) == {None}


def test_there_is_no_verdict_where_a_floor_held_fewer_tokens():
    """The budget of a schedule's second stage says nothing about the first."""
    entrants = enter(["random | evict(0.9); fastv({keep})"], [0.5])
    found = told(entrants, [95] * len(entrants), held={"method": 90})
    assert {row.kind: row.beats_floors for row in found}["method"] is None
    equal = told(entrants, [95] * len(entrants), held={"method": 64})
    assert {row.kind: row.beats_floors for row in equal}["method"] is False


def test_tokens_are_those_of_a_picture_where_budgets_are_for_crops():
    """Five crops each, of which the report tells one by one."""
    entrants = enter(["fastervlm"], [8])
    found = told(entrants, [50] * len(entrants), crops=5)
    assert {row.tokens for row in found} == {((0, 64.0),)}
    assert found[-1].keep == pytest.approx(8 / (64 / 5))


def test_f1_knows_yes_in_any_case():
    samples = [
        Sample(str(n), "", "q", (answer,), "existence") for n, answer in enumerate(["Yes", "No"])
    ]
    said = Record(["yes.", "no"], first=[1.0], total=[1.0])
    (row,) = rows(samples, enter([], [])[:1], [said])
    assert (row.f1, row.accuracy) == (1.0, 1.0)


@pytest.mark.parametrize(("batch", "rounds", "timed"), [(2, 2, 1), (4, 2, 1), (1, 4, 3)])
def test_everybody_is_warmed_up_before_times_are_taken(
    shipped, samples, monkeypatch, batch, rounds, timed
):
    answered = []
    real = bench_rounds._answer

    def noting(model, processor, inputs, entrant, *rest):
        answered.append(entrant.label)
        real(model, processor, inputs, entrant, *rest)

    entrants = enter(["vtc-cls"], [0.25])[:3]
    monkeypatch.setattr(bench_rounds, "_answer", noting)
    found = bench_rounds.ask(
        *shipped, samples[:4], entrants, text=prompter(shipped[1]), batch=batch, max_new_tokens=1
    )
    assert answered == [one.label for one in entrants] * rounds
    assert [len(one.total) for one in found] == [len(one.first) for one in found] == [timed] * 3
    assert [len(one.selector) for one in found] == [0, 0, timed]
    assert all(len(one.replies) == 4 for one in found)


def test_differences_to_floors_are_paired():
    """70 right against 60 right of the same 100: a paired error, not that of two samples."""
    entrants = enter(["vtc-cls"], [0.5])
    right = {"vtc-cls": 70, "uniform": 60}
    found = told(entrants, [right.get(one.label, 20) for one in entrants])
    method = next(row for row in found if row.kind == "method")
    floor = next(row for row in found if row.label == "uniform")
    assert method.accuracy - floor.accuracy < 2 * (method.error**2 + floor.error**2) ** 0.5
    assert method.beats_floors
