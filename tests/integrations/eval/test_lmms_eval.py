"""The command `lmms-eval` on the shipped model: answers and scores of our own API, exit codes."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest

import tokenprune
from support.lmms_eval_command import Harness, Ran
from tokenprune_adapters import pocket

pytest.importorskip("lmms_eval", reason="make test-eval installs it, in an environment of its own")

MODEL = {"pretrained": pocket.CHECKPOINT, "dtype": "float32"}
REPORT = {"report": "report.json"}
CACHE = ("--use_cache", "../cache")
SMALL = "vtc-cls(keep=5)"
# Commas, both quotes, an alternation, two stages: all that could be lost between shell and model.
SCHEDULE = (
    "cls-attention(layers=2, ensemble='max') | evict(9, per=\"image\") @ before-llm; "
    "random(seed=3) | evict(0.5) @ after-layer(2, positions='original')"
)


@cache
def loaded() -> Any:
    return pocket.load()


def direct(harness: Harness, spec: str | None) -> tuple[list[str], float, list[tokenprune.Report]]:
    """The same questions, asked by our own API: answers, share of right ones, reports."""
    from datasets import load_from_disk

    model, processor = loaded()
    answers, right, reports = [], [], []
    with tokenprune.attach(model, spec) if spec else nullcontext() as pruned:
        for row in load_from_disk(str(harness.place / "pictures"))["test"]:
            text = pocket.prompt(row["question"])
            inputs = processor(images=row["picture"], text=text, return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=1, do_sample=False)
            new = output[0, inputs["input_ids"].shape[1] :]
            answers.append(processor.decode(new, skip_special_tokens=True).strip())
            right.append(answers[-1] == row["answer"])
            if pruned is not None:
                reports.append(pruned.report)
    return answers, sum(right) / len(right), reports


@pytest.fixture(scope="module")
def vanilla(harness: Harness) -> Ran:
    """lmms-eval's own model."""
    return harness.run("pocket", "llava_hf", **MODEL, device_map="cpu")  # or it fails


@pytest.fixture(scope="module")
def small(harness: Harness) -> Ran:
    return harness.run("pocket", "llava_hf_tokenprune", *CACHE, **MODEL, **REPORT, prune=SMALL)


def test_scores_and_answers_are_those_of_our_own_api(harness: Harness, small: Ran) -> None:
    answers, score, _ = direct(harness, SMALL)
    assert small.code == 0, small.words
    assert small.answers == answers
    assert small.score == pytest.approx(score)


def test_vanilla_is_vanilla_and_compression_shows(
    harness: Harness, vanilla: Ran, small: Ran
) -> None:
    answers, score, _ = direct(harness, None)
    assert vanilla.code == 0, vanilla.words
    assert vanilla.answers == answers
    assert vanilla.score == pytest.approx(score)
    assert score > 0
    assert small.answers != vanilla.answers


def test_keeping_everything_is_lmms_evals_own_model(
    harness: Harness, vanilla: Ran, small: Ran
) -> None:
    """Also with a cache of answers that knows those of another spec."""
    everything = harness.run(
        "pocket", "llava_hf_tokenprune", *CACHE, **MODEL, **REPORT, prune="vtc-cls(keep=1.0)"
    )
    assert everything.code == 0, everything.words
    assert everything.answers == vanilla.answers
    assert everything.score == vanilla.score
    assert everything.report["prompts"] == small.report["prompts"] > 0
    assert everything.report["tokens_before"] == everything.report["tokens_after"] > 0


def test_the_cache_of_answers_is_used_for_the_same_spec(harness: Harness, small: Ran) -> None:
    again = harness.run("pocket", "llava_hf_tokenprune", *CACHE, **MODEL, **REPORT, prune=SMALL)
    assert again.code == 0, again.words
    assert again.answers == small.answers
    assert again.score == small.score
    assert again.report["prompts"] == 0


def test_the_report_is_logged_with_the_results(harness: Harness, small: Ran) -> None:
    *_, reports = direct(harness, SMALL)
    report = small.report
    assert report["spec"] == "cls-attention | evict(5) @ before-llm"
    assert report["pretrained"] == str(pocket.CHECKPOINT)
    assert report["prompts"] == report["images"] == len(reports)
    assert report["tokens_before"] == reports[-1].tokens_before
    assert report["tokens_after"] == reports[-1].tokens_after == 5 * len(reports)
    assert report["tokens_by_layer"] == [{"from_layer": 0, "tokens": 5 * len(reports)}]
    assert report["kv_bytes"] == sum(each.kv_bytes for each in reports)
    assert report["kv_bytes_vanilla"] == sum(each.kv_bytes_vanilla for each in reports)
    assert report["selector_seconds"] > 0
    for name, mean in report["per_image"].items():
        assert small.throughput[f"avg_{name}"] == pytest.approx(mean), name


def test_a_schedule_with_commas_quotes_and_bars_in_the_simple_mode(harness: Harness) -> None:
    answers, score, reports = direct(harness, SCHEDULE)
    ran = harness.run(
        "pocket", "llava_hf_tokenprune", "--force_simple", **MODEL, **REPORT, prune=SCHEDULE
    )
    assert ran.code == 0, ran.words
    assert ran.answers == answers
    assert ran.score == pytest.approx(score)
    assert [layer for layer, _ in reports[-1].layers] == [0, 2]
    assert ran.report["tokens_by_layer"] == [
        {"from_layer": layer, "tokens": sum(dict(each.layers)[layer] for each in reports)}
        for layer in (0, 2)
    ]


@pytest.mark.parametrize(
    ("prune", "words"),
    [
        ("vtc-clz(keep=5)", "UnknownNameError: unknown strategy 'vtc-clz'"),
        ("vtc-cls(keep=5", r") is missing in model_args"),
        ("cls-attention | evict(5) @ after-layer(99)", "does this model have such layers?"),
    ],
)
def test_a_spec_that_cannot_work_ends_non_zero(harness: Harness, prune: str, words: str) -> None:
    ran = harness.run("pocket", "llava_hf_tokenprune", **MODEL, prune=prune)
    assert ran.code == 1, ran.words
    assert words in ran.words
    assert ran.score is None


@pytest.mark.parametrize("mode", [(), ("--force_simple",)], ids=["chat", "simple"])
def test_a_strategy_that_fails_midway_ends_non_zero_and_scores_nothing(
    harness: Harness, mode: tuple[str, ...]
) -> None:
    ran = harness.run("pocket", "llava_hf_tokenprune", *mode, **MODEL, prune="breaks | evict(5)")
    assert ran.code == 1, ran.words
    assert "tokenprune: generate failed: RuntimeError: out of order" in ran.words
    assert "Traceback" in ran.words
    assert ran.score is None
    assert ran.answers == []


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("missing", "tokenprune: nothing was scored. Error during evaluation: "),
        ("unscored", "tokenprune: nothing was scored. Error during evaluation: RetryError"),
    ],
)
def test_what_fails_outside_of_the_model_ends_non_zero(
    harness: Harness, task: str, words: str
) -> None:
    """lmms-eval's command prints such errors, and ends with exit code 0."""
    ran = harness.run(task, "llava_hf_tokenprune", "--limit", "2", **MODEL, prune=SMALL)
    assert ran.code == 1, ran.words
    assert words in ran.words
    assert "Traceback" in ran.words
    assert ran.score is None


def test_both_models_are_on_lmms_evals_list() -> None:
    from lmms_eval.models import MODEL_REGISTRY_V2

    for name in ("llava_hf_tokenprune", "video_llava_tokenprune"):
        for simple in (False, True):
            chosen = MODEL_REGISTRY_V2.get_model_class(name, force_simple=simple)
            assert chosen.__module__.startswith("tokenprune_adapters.lmms_eval.")
