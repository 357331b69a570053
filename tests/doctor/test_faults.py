"""The doctor fails on planted faults, names the class, and says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaModel
from typer.testing import CliRunner

from support.llava import tiny_llava
from tokenprune import Evict, Plan
from tokenprune.cli.app import app
from tokenprune.doctor import examine, examine_model
from tokenprune.plugins import Registry
from tokenprune.trial import Answer, Cut, Questions, Trial
from tokenprune_adapters.hf import checks
from tokenprune_adapters.hf.family_adapter import FamilyAdapter
from tokenprune_adapters.hf.llm import inner_stages, segment, short_prompt
from tokenprune_adapters.hf.names import Call

Patch: TypeAlias = pytest.MonkeyPatch
LLAVA = "LlavaForConditionalGeneration (CLIP)"
BEFORE, INSIDE = "before the LLM", "after layer 2"


@pytest.fixture(autouse=True)
def llava(offering: Callable[..., Registry]) -> Registry:
    """One class is enough, and faster."""
    return offering()


def plan_shifted_by_one_patch(patch: Patch) -> None:
    def plan(self: Any, *args: Any) -> Plan:
        made = original(self, *args)
        return replace(made, anchors=((made.anchors + 1) % made.tokens).sort(1).values)

    original = Evict.plan
    patch.setattr(Evict, "plan", plan)


def mask_not_applied(patch: Patch) -> None:
    patch.setattr(segment, "_mask", lambda *args: None)


def _one_more(moved: Tensor | None) -> Tensor:
    return torch.ones(1, dtype=torch.int64) if moved is None else moved + 1


def positions_off_by_one_while_decoding(patch: Patch) -> None:
    def note(cache: Any, states: dict[int, Any]) -> None:
        moved = {start: replace(s, moved=_one_more(s.moved)) for start, s in states.items()}
        original(cache, moved)

    original = short_prompt.note
    patch.setattr(short_prompt, "note", note)


def other_policy_of_positions(patch: Patch) -> None:
    def enter(slots: Any, before: Any, whole: Any, positions: str, *rest: Any) -> Any:
        other = {"original": "reindexed", "reindexed": "original"}[positions]
        return original(slots, before, whole, other, *rest)

    original = segment.enter
    patch.setattr(short_prompt, "enter", enter)
    patch.setattr(inner_stages, "enter", enter)


def fillers_forgotten_in_the_cache(patch: Patch) -> None:
    def note(cache: Any, states: dict[int, Any]) -> None:
        original(cache, {start: replace(s, valid=None) for start, s in states.items()})

    original = short_prompt.note
    patch.setattr(short_prompt, "note", note)


def an_argument_of_the_cache_renamed(patch: Patch) -> None:
    """As a release of transformers may do."""

    def forward(
        self: Any,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        renamed_cache: Any = None,
        inputs_embeds: Any = None,
        **rest: Any,
    ) -> Any:
        return original(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **rest,
        )

    original = LlamaModel.forward
    patch.setattr(LlamaModel, "forward", forward)


def wrong_name_of_the_cache_in_the_wall(patch: Patch) -> None:
    patch.setattr(Call.cache, "names", ("kv_cache",))


def cache_never_read(patch: Patch) -> None:
    """The silent kind: nothing checks, and what is read is None."""
    patch.setattr(Call.cache, "names", ("kv_cache",))
    patch.setattr(checks, "_check", lambda *args: None)


def wrong_name_of_the_mask_and_no_check(patch: Patch) -> None:
    patch.setattr(Call.mask, "names", ("masking",))
    patch.setattr(checks, "_check", lambda *args: None)


def adapter_that_raises(patch: Patch) -> None:
    def install(self: Any, *args: Any) -> Iterator[Any]:
        raise KeyError("hidden_states")

    patch.setattr(FamilyAdapter, "install", install)


def nothing_attached(patch: Patch) -> None:
    patch.setattr(FamilyAdapter, "install", lambda self, *args: iter(()))


FAULTS: dict[Callable[[Patch], None], dict[str, str]] = {
    plan_shifted_by_one_patch: {BEFORE: "logits differ by", INSIDE: "logits differ by"},
    mask_not_applied: {BEFORE: "logits differ by", INSIDE: "logits differ by"},
    positions_off_by_one_while_decoding: {BEFORE: "logits differ by", INSIDE: "logits differ by"},
    other_policy_of_positions: {BEFORE: "logits differ by", INSIDE: "logits differ by"},
    fillers_forgotten_in_the_cache: {BEFORE: "logits differ by", INSIDE: "logits differ by"},
    an_argument_of_the_cache_renamed: {
        BEFORE: "UnsupportedError: LlamaModel does not take",
        INSIDE: "UnsupportedError: LlamaModel does not take",
    },
    wrong_name_of_the_cache_in_the_wall: {
        BEFORE: "UnsupportedError: LlavaModel does not take kv_cache",
        INSIDE: "UnsupportedError: LlavaModel does not take kv_cache",
    },
    cache_never_read: {BEFORE: "this KV cache belongs", INSIDE: "this KV cache belongs"},
    wrong_name_of_the_mask_and_no_check: {BEFORE: "logits differ by", INSIDE: "attention rows of"},
    adapter_that_raises: {BEFORE: "KeyError: 'hidden_states'", INSIDE: "KeyError: 'hidden_states'"},
    nothing_attached: {BEFORE: "logits differ by", INSIDE: "logits differ by"},
}
"""What each fault is found by, and where; the model without anything attached agrees."""


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_found(fault: Callable[[Patch], None], monkeypatch: Patch) -> None:
    fault(monkeypatch)
    found = examine()
    reasons = {each.where: each.reason for each in found.failed}
    assert reasons.keys() == FAULTS[fault].keys()
    for where, words in FAULTS[fault].items():
        assert words in reasons[where]
    assert all(each.gap is None or not each.gap < 0.01 for each in found.failed)


def test_a_class_that_cannot_be_built_is_a_failure(monkeypatch: Patch) -> None:
    def init(self: Any, config: Any) -> None:
        raise TypeError("__init__() got an unexpected keyword\nand more")

    monkeypatch.setattr(LlavaForConditionalGeneration, "__init__", init)
    (failed,) = examine().comparisons
    assert (failed.model, failed.where, failed.outcome) == (LLAVA, "building it", "failed")
    assert failed.reason == "TypeError: __init__() got an unexpected keyword"
    assert failed.traceback.endswith("and more\n")


def test_a_model_that_cannot_be_read_by_hand_is_a_failure(monkeypatch: Patch) -> None:
    def prompts(*args: Any) -> Any:
        raise AttributeError("'LlamaModel' object has no attribute 'embed'")

    monkeypatch.setattr("tokenprune_adapters.hf.trials.chat.prompts", prompts)
    (failed,) = examine().comparisons
    assert (failed.where, failed.reason) == (
        "reading it by hand",
        "AttributeError: 'LlamaModel' object has no attribute 'embed'",
    )


def test_a_broken_plugin_is_a_failure(llava: Registry) -> None:
    llava.broken["tokenprune-nope"] = ImportError("cannot import name 'Nope'")
    (failed,) = examine().failed
    assert (failed.model, failed.where) == ("tokenprune-nope", "loading the plugin")
    assert failed.reason == "ImportError: cannot import name 'Nope'"


def test_trials_that_cannot_be_loaded_are_a_failure(llava: Registry) -> None:
    def trials() -> list[Trial]:
        raise ImportError("no such module")

    offer = llava.models[0]
    llava.models[0] = replace(offer, plugin=replace(offer.plugin, trials=trials))
    (failed,) = examine().comparisons
    assert (failed.model, failed.where) == ("hf-llava", "loading its trials")


def test_a_module_that_cannot_be_looked_for_is_a_failure(
    llava: Registry, offering: Callable[..., Registry]
) -> None:
    assert llava.models[0].plugin.trials is not None
    (first,) = llava.models[0].plugin.trials()
    offering(replace(first, module="nowhere.inside"), first)
    found = examine()
    (failed,) = found.failed
    assert failed.reason == "ModuleNotFoundError: No module named 'nowhere'"
    assert len(found.comparisons) == 4


def test_what_is_no_trial_is_a_failure(offering: Callable[..., Registry]) -> None:
    offering("LLaVA")  # type: ignore[arg-type]
    (failed,) = examine().comparisons
    assert failed.where == "loading its trials"
    assert failed.reason.endswith("trials of 'hf-llava' must be of type Trial, got 'LLaVA'")
    (failed,) = examine_model(tiny_llava()).comparisons
    assert (failed.model, failed.where) == (
        "LlavaForConditionalGeneration",
        "loading its trials",
    )


def linear(*cuts: Cut, answer: float = 0) -> Trial:
    """A trial of a model that always answers the same."""
    made = Answer(torch.empty(1, 0), torch.full((1, 1, 3), answer))
    return Trial("m", "torch", lambda: nn.Linear(1, 1), lambda m: Questions(lambda: made, cuts))


def test_a_trial_without_cuts_is_a_failure(offering: Callable[..., Registry]) -> None:
    def broken(model: nn.Module) -> Questions:
        def cuts() -> Iterator[Cut]:
            raise KeyError("cut")
            yield

        return replace(linear().questions(model), cuts=cuts())  # type: ignore[arg-type]

    offering(linear(), replace(linear(), questions=broken))
    none, raising = examine().failed
    assert none.reason == "its trial makes no cuts, so nothing was compared"
    assert (raising.where, raising.reason) == ("reading it by hand", "KeyError: 'cut'")


def test_infinity_is_a_failure_that_json_can_hold(offering: Callable[..., Registry]) -> None:
    def by_hand(text: torch.Tensor, shift: int) -> torch.Tensor:
        return torch.zeros(1, 1, 3)

    offering(linear(Cut("[/] there", "", by_hand), answer=torch.inf))
    result = CliRunner().invoke(app, ["doctor", "--json"])
    (said,) = json.loads(result.stdout)["comparisons"]
    assert (result.exit_code, said["outcome"], said["gap"]) == (1, "failed", None)
    assert "logits differ by inf" in said["reason"]
    assert "[/] there" in CliRunner().invoke(app, ["doctor"]).output


def test_what_plugins_print_is_not_in_the_json(offering: Callable[..., Registry]) -> None:
    def build() -> nn.Module:
        print("Loading ...")  # noqa: T201
        return nn.Linear(1, 1)

    offering(replace(linear(), build=build))
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert json.loads(result.stdout)["ok"] is False
    assert "Loading ..." in result.stderr


def test_nan_and_other_shapes_are_failures(offering: Callable[..., Registry]) -> None:
    def trial(logits: torch.Tensor) -> Trial:
        answer = Answer(torch.empty(1, 0), torch.zeros(1, 1, 3))
        cut = Cut("as it is", "", lambda text, shift: logits)
        return Trial(
            "m", "torch", lambda: nn.Linear(1, 1), lambda m: Questions(lambda: answer, [cut])
        )

    offering(trial(torch.full((1, 1, 3), torch.nan)), trial(torch.zeros(1, 2, 3)))
    nan, shape = examine().failed
    assert nan.reason.startswith("logits differ by nan")
    assert shape.reason == "the model returns logits of shape (1, 1, 3), by hand it is (1, 2, 3)"


def test_a_trial_that_a_wrong_plan_passes_shows_nothing(offering: Callable[..., Registry]) -> None:
    """Weights that are not peaked: whatever is kept, logits hardly move."""
    known = offering()
    assert known.models[0].plugin.trials is not None
    (first,) = known.models[0].plugin.trials()

    def build() -> nn.Module:
        model = first.build()
        with torch.no_grad():
            for weight in model.model.language_model.parameters():
                weight.mul_(1e-4 if weight.ndim > 1 else 1)
        return model

    offering(replace(first, build=build))
    found = examine()
    assert {each.outcome for each in found.failed} == {"unclear"}
    assert "a wrong plan would move logits by" in found.failed[0].reason
