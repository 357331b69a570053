"""The doctor on what is installed: everything agrees, and a wrong plan would show."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

from tokenprune import ModelPlugin, UnsupportedError
from tokenprune.doctor import Examination, examine, examine_model
from tokenprune.plugins import registry
from tokenprune.testing.snapshot import Snapshot
from tokenprune.trial import Trial
from tokenprune.versions import LIBRARIES
from tokenprune_adapters.hf.checks import VERSION
from tokenprune_adapters.hf.families import FAMILIES

OURS = ("hf-llava", "hf-llava-next", "hf-video-llava", "open-clip-visual")
DESCRIBED = tuple(
    each.name for each in FAMILIES if each.oldest <= VERSION and each.name not in OURS
)


STATES = {
    claim.rpartition(".")[2]
    for each in FAMILIES
    if each.states and each.name in DESCRIBED
    for claim in each.classes
}
"""Classes after whose layers nothing is cut."""


@pytest.fixture(scope="module")
def found() -> Examination:
    return examine(only=(*OURS, *DESCRIBED))


def trials(plugin: str) -> list[Trial]:
    known = registry()
    record = known.named(known.models, plugin, "model adapter")
    assert isinstance(record, ModelPlugin)
    assert record.trials is not None
    return list(record.trials())


ALL = [trial for plugin in (*OURS, *DESCRIBED) for trial in trials(plugin)]


def test_every_comparison_agrees(found: Examination) -> None:
    assert [each for each in found.comparisons if each.outcome != "ok"] == []
    assert found.as_dict()["ok"] is True
    for each in found.comparisons:
        assert each.gap is not None
        assert each.gap < (5e-4 if each.model in STATES else 1e-4)


def test_every_class_is_compared_at_every_place(found: Examination) -> None:
    made = {(each.model, each.where) for each in found.comparisons}
    llms = {
        "LlavaForConditionalGeneration (CLIP)",
        "LlavaForConditionalGeneration (SigLIP)",
        "LlavaForConditionalGeneration (DINOv2)",
        "LlavaForConditionalGeneration (Pixtral)",
        "LlavaNextForConditionalGeneration",
        "VideoLlavaForConditionalGeneration",
    }
    for family in FAMILIES:
        if family.name in DESCRIBED and family.name not in OURS:
            llms |= {claim.rpartition(".")[2] for claim in family.classes}
    wanted = {(m, w) for m in llms for w in ("before the LLM", "after layer 2", "detached")}
    wanted -= {(model, "after layer 2") for model in STATES}
    for tower, block in (("VisionTransformer of open_clip", 2), ("TimmModel of open_clip", 3)):
        wanted |= {(tower, f"after block {block}"), (tower, "detached")}
    assert made == wanted


def test_a_wrong_plan_moves_logits_by_more_than_one(found: Examination) -> None:
    compressed = [each for each in found.comparisons if each.spec]
    # Each LLM twice, those with states once, as each of two towers.
    assert len(compressed) == 2 * (len(ALL) - 2) - len(STATES) + 2
    for each in compressed:
        assert each.sensitivity is not None
        assert each.sensitivity > 1, each


def test_every_claimed_class_has_a_trial() -> None:
    claims = {
        claim.rpartition(".")[2]
        for offer in registry().models
        if offer.plugin.name in (*OURS, *DESCRIBED)
        for claim in offer.plugin.claims
    }
    assert {type(trial.build()).__name__ for trial in ALL} == claims


def test_versions_stand_beside_the_tested_ones(found: Examination) -> None:
    assert [each.name for each in found.versions] == [each.name for each in LIBRARIES]
    python = found.versions[0]
    assert python.found == ".".join(map(str, sys.version_info[:3]))
    assert python.tested == f"{LIBRARIES[0].oldest} to {LIBRARIES[0].newest}"
    assert [each.tested for each in found.versions if each.name == "lmms-eval"] == ["0.7.3"]


def test_the_report_is_json(found: Examination) -> None:
    again = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert again["device"] == "cpu"
    assert again["comparisons"][0]["model"] == "LlavaForConditionalGeneration (CLIP)"


@pytest.mark.parametrize("trial", ALL, ids=lambda trial: trial.name)
def test_models_are_the_same_every_time_and_left_as_they_were(trial: Trial) -> None:
    model, again = trial.build(), trial.build()
    assert not model.training
    weights = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)
    examine_model(model)  # transformers leaves hooks of its own where maps were asked for
    before = Snapshot(model)
    assert not examine_model(model).failed
    # Qwen writes that itself, whatever is attached.
    assert [each for each in before.differences() if "rope_deltas" not in each] == []


@pytest.mark.parametrize("trial", ALL, ids=lambda trial: trial.name)
def test_by_hand_follows_the_text_and_the_shift(trial: Trial) -> None:
    """Otherwise the comparison would not see what it is for."""
    model: Any = trial.build()
    with torch.no_grad():
        questions = trial.questions(model)
        answer = questions.ask()
        for cut in questions.cuts:
            right = cut.by_hand(answer.text, 0)
            assert right.shape == answer.logits.shape
            if not cut.spec:
                # Linear attention adds up in chunks.
                atol = 5e-4 if trial.name in STATES else 1e-4
                torch.testing.assert_close(right, answer.logits, rtol=0, atol=atol)
                continue
            assert float((right - answer.logits).abs().max()) > 0.5  # than with all tokens
            if answer.text.numel():
                other = cut.by_hand((answer.text + 1) % 90, 0)
                assert torch.equal(other[:, :2], right[:, :2])
                assert not torch.allclose(other[:, 2:], right[:, 2:])


def test_a_library_that_is_not_there_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenprune.doctor.compare.find_spec", lambda name: None)
    found = examine(only=["open-clip-visual"])
    assert [each.outcome for each in found.comparisons] == ["not installed", "not installed"]
    assert found.failed == ()


def test_a_model_without_adapter_or_trial_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="no adapter supports .*Linear"):
        examine_model(torch.nn.Linear(2, 2))
    model = ALL[0].build()
    for offer in registry().models:
        if offer.plugin.name == "hf-llava":
            monkeypatch.setitem(offer.plugin.__dict__, "trials", None)
    with pytest.raises(UnsupportedError, match="offers no trial to compare it by; those that do: "):
        examine_model(model)
    assert [each.outcome for each in examine(only=["hf-llava"]).comparisons] == ["no trial"]
