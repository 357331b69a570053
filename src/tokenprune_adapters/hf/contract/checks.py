"""F1 to F9: what a family promises. Each check raises an AssertionError that says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tokenprune
from tokenprune.spec import parse
from tokenprune.testing.snapshot import Snapshot

from ..trials.oracle import Cut, Expected, Oracle
from .case import FamilyCase, Inputs

STEPS = 3
ATTENTION = ("sdpa", "eager")


def check_f1_a_full_budget_changes_no_bit(case: FamilyCase) -> None:
    """With every token kept, real slots are the plain model's, bit for bit."""
    model, inputs = case.build("sdpa"), case.inputs((0, 1))
    real = inputs["attention_mask"].bool()
    plain = _logits(model, inputs)[real]
    for where in _wheres(case, "after-layer(1)"):
        with tokenprune.attach(model, f"uniform | evict(1.0) @ {where}"):
            _require(torch.equal(_logits(model, inputs)[real], plain), case, f"{where} changes it")


def check_f2_detaching_restores_the_model(case: FamilyCase) -> None:
    """After detaching nothing is left on the model but what it writes itself."""
    model, inputs = case.build("sdpa"), case.inputs((0, 1))
    plain = _logits(model, inputs)
    before = Snapshot(model)
    with tokenprune.attach(model, _specs(case, f"fastv | {_evict(case, 4)} @ after-layer(2)")[-1]):
        _logits(model, inputs)
        case.generate(model, inputs, 2)
    left = [each for each in before.differences() if not any(own in each for own in case.state)]
    _require(not left, case, f"detaching leaves {left}")
    _require(torch.equal(_logits(model, inputs), plain), case, "detaching does not restore it")


def check_f3_eviction_is_that_of_the_plain_model(case: FamilyCase) -> None:
    """What is left of evicted prompts is computed as the plain model would without the rest."""
    for layer in (0,) if case.family.states else (0, 1, 3):
        spec = f"uniform | {_evict(case, 5)} @ {_place(layer)}"
        _compare(case, spec, Cut(layer, _strategy("uniform | evict(5)")))


def check_f4_merging_is_that_of_the_plain_model(case: FamilyCase) -> None:
    """Merged tokens are the means of their members, at their anchors.

    Before a projector the features that are merged are a tower's, which the oracle does not see.
    """
    layers = (1,) if case.family.projector else (0, 1)
    for layer in (0,) if case.family.states else layers:
        spec = f"{case.budget('tome', 5)} @ {_place(layer)}"
        _compare(case, spec, Cut(layer, _strategy("tome(5)")))


def check_f5_text_ranks_as_in_the_plain_model(case: FamilyCase) -> None:
    """FastV keeps what the last token attends to most in eager maps, alone and in a schedule."""
    if case.family.states:  # after whose layers nothing can be left out, which is refused
        return
    fastv = f"fastv | {_evict(case, 4)} @ after-layer(2)"
    _compare(case, fastv, Cut(2, None, keep=4))
    later = f"fastv | {_evict(case, 3)} @ after-layer(3)"
    first = Cut(0, _strategy("uniform | evict(6)"))
    _compare(case, f"{_before(case, 6)}; {later}", first, Cut(3, None, keep=3))


def check_f6_a_prompt_is_pruned_alone_as_in_a_batch(case: FamilyCase) -> None:
    """Random scores are of the picture, whatever it is batched with."""
    model, batch = case.build("sdpa"), case.inputs((0, 1))
    for where in _wheres(case, "after-layer(2)"):
        with tokenprune.attach(model, f"random | {_evict(case, 5)} @ {where}"):
            together = _logits(model, batch)
            for number in range(2):
                alone = dict(case.inputs((number,)))
                slots = alone["input_ids"].shape[1]
                if case.family.planes == "one":  # counted by the model, from a mask or not
                    first = batch["input_ids"].shape[1] - slots
                    alone["position_ids"] = torch.arange(first, first + slots)[None]
                got = _logits(model, alone)[0]
                _close(case, got, together[number, -slots:], f"prompt {number} alone, {where}")


def check_f7_caches_beams_and_turns_are_those_of_no_cache(case: FamilyCase) -> None:
    """Tokens are the same with a dynamic cache, a static one and none; a second turn goes on."""
    model, inputs = case.build("sdpa"), case.inputs((0, 1))
    after = f"uniform | {_evict(case, 4)} @ after-layer(2)"
    for spec in _specs(case, after):
        with tokenprune.attach(model, spec):
            for beams in (1, 3):
                say = partial(case.generate, model, inputs, 4, num_beams=beams)
                wanted = say(use_cache=False)
                static = say(cache_implementation="static", disable_compile=True)
                _require(torch.equal(say(), wanted), case, f"{spec}, {beams} beams: cache")
                _require(torch.equal(static, wanted), case, f"{spec}, {beams} beams: static cache")
            _turn(case, model)


def check_f8_reports_are_of_the_pictures(case: FamilyCase) -> None:
    """Reports tell pictures from videos, and what is left of each is within it."""
    model, inputs = case.build("sdpa"), case.inputs((0, 1))
    sizes = [slots for _, slots in case.rows]
    if case.patches is not None:
        sizes = [int((each >= 0).sum()) for each in case.patches]
    kinds = [kind for kind, _ in case.rows]
    expected = sorted((kind, min(5, size)) for kind, size in zip(kinds, sizes, strict=True))
    for where in _wheres(case, "after-layer(2)"):
        with tokenprune.attach(model, f"uniform | {_evict(case, 5)} @ {where}") as attachment:
            _logits(model, inputs)
        kept = attachment.report.kept
        _require(sorted((each.kind, len(each)) for each in kept) == expected, case, f"{kept}")
        _require(attachment.report.tokens_before == sum(sizes), case, "tokens before")
        for each in kept:
            _require(len({*zip(each.crop, each.patch, strict=True)}) == len(each), case, f"{each}")


def check_f9_text_without_pictures_is_the_plain_models(case: FamilyCase) -> None:
    """A prompt of text alone is computed as without an attachment, beside others and by itself."""
    model, mixed, text = case.build("sdpa"), case.inputs((0, 2)), case.inputs((2,))
    slots = text["input_ids"].shape[1]
    plain, alone = _logits(model, mixed)[1, -slots:], _logits(model, text)
    said = case.generate(model, text, STEPS)
    after = f"fastv | {_evict(case, 4)} @ after-layer(2)"
    for spec in _specs(case, after):
        with tokenprune.attach(model, spec):
            _close(case, _logits(model, mixed)[1, -slots:], plain, f"{spec}, beside a picture")
            _require(torch.equal(_logits(model, text), alone), case, f"{spec}, text alone")
            _require(torch.equal(case.generate(model, text, STEPS), said), case, f"{spec}, text")


CHECKS: tuple[Callable[[FamilyCase], None], ...] = (
    check_f1_a_full_budget_changes_no_bit,
    check_f2_detaching_restores_the_model,
    check_f3_eviction_is_that_of_the_plain_model,
    check_f4_merging_is_that_of_the_plain_model,
    check_f5_text_ranks_as_in_the_plain_model,
    check_f6_a_prompt_is_pruned_alone_as_in_a_batch,
    check_f7_caches_beams_and_turns_are_those_of_no_cache,
    check_f8_reports_are_of_the_pictures,
    check_f9_text_without_pictures_is_the_plain_models,
)
"""Every check; each takes a case."""


def _turn(case: FamilyCase, model: Any) -> None:
    """A second turn on the cache of the first is what the whole text gives."""
    first, whole = case.inputs((0,)), case.longer()
    with torch.no_grad():
        out = model(**first, use_cache=True)
        cache = out["cache" if "cache" in out else "past_key_values"]
        more = {"input_ids": whole["input_ids"][:, -3:], "attention_mask": whole["attention_mask"]}
        if case.family.planes != "one":  # which models count for whole prompts alone
            last = first["input_ids"].shape[1] + case.anatomy(model).core.rope_deltas
            more["position_ids"] = (last + torch.arange(3)).expand(3, 1, 3)
        second = model(**more, past_key_values=cache, use_cache=True).logits
    _close(case, second, _logits(model, whole)[:, -3:], "a second turn")


def _compare(case: FamilyCase, spec: str, *cuts: Cut) -> None:
    """Logits at what is left, and the next tokens, in both attention implementations."""
    inputs = case.inputs((0, 1))
    wanted = expected_of(case, inputs, *cuts)
    for attention in ATTENTION:
        model = case.build(attention)
        with tokenprune.attach(model, spec):
            got = _logits(model, inputs)
            text = case.generate(model, inputs, STEPS)
        _close(case, got[wanted.left], wanted.logits[wanted.left], f"{spec}, {attention}")
        _require(torch.equal(text, wanted.text), case, f"{spec}, {attention}: {text}")


def expected_of(case: FamilyCase, inputs: Inputs, *cuts: Cut) -> Expected:
    """What the oracle expects of both prompts."""
    model = case.build("eager")
    parts = case.anatomy(model)
    slots = {
        kind: parts.placeholders(inputs["input_ids"], kind).nonzero().T
        for kind in {kind for kind, _ in case.rows}
    }
    taken = dict.fromkeys(slots, 0)
    rows = []
    for kind, length in case.rows:
        rows.append(slots[kind][:, taken[kind] : taken[kind] + length])
        taken[kind] += length
    return Oracle(model, parts.llm, rows, case.patches, cuts, case.silent).expected(inputs, STEPS)


@torch.no_grad()
def _logits(model: Any, inputs: Inputs) -> Tensor:
    logits: Tensor = model(**inputs).logits
    return logits


def _strategy(spec: str) -> Any:
    return parse(spec).strategy


def _evict(case: FamilyCase, keep: int) -> str:
    return case.budget("evict", keep)


def _before(case: FamilyCase, keep: int) -> str:
    return f"uniform | {_evict(case, keep)} @ {_place(0)}"


def _wheres(case: FamilyCase, after: str) -> tuple[str, ...]:
    """Placements: before the LLM, and `after` where the family offers it."""
    return ("before-llm",) if case.family.states else ("before-llm", after)


def _specs(case: FamilyCase, after: str) -> tuple[str, ...]:
    """A reduction before the LLM, the one `after` a layer, and both, where they are offered."""
    before = _before(case, 5)
    return (before,) if case.family.states else (before, after, f"{before}; {after}")


def _place(layer: int) -> str:
    return f"after-layer({layer})" if layer else "before-llm(positions='original')"


def _close(case: FamilyCase, got: Tensor, wanted: Tensor, what: str) -> None:
    gap = float((got - wanted).abs().max())
    # NaN is not <= anything.
    _require(gap <= case.tolerance, case, f"{what}: logits differ by {gap}")


def _require(kept: bool, case: FamilyCase, what: str) -> None:
    if not kept:
        raise AssertionError(f"{case.family.name}: {what}")
