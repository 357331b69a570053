"""M8 to M15: what every model adapter promises of uses beyond one prompt and a scorer."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ..attachment import Attachment, attach
from ..errors import UnsupportedError
from ..placement import BeforeLLM, Placement
from ..plan import Plan
from ..plugins import registry
from ..scorers import RandomScorer
from ..signals import Signals
from ..strategy import Reducer, Strategy
from ..tokens import VisualTokens
from .cases import ModelCase
from .inputs import same_bits
from .model_probes import attached, chosen_slots, close, everything
from .promises import promise, require
from .snapshot import tensors_in

SLACK = 1024
"""Bytes that may come and go from call to call."""


@promise(ModelCase)
@torch.no_grad()
def check_m8_merged_tokens_reach_the_llm(case: ModelCase) -> None:
    """What a plan merges is what the language model reads, not what stood in its place."""
    model, prompts, _ = everything(case)
    for place in case.placements:
        if not isinstance(place, Placement):
            continue
        for number, prompt in enumerate(prompts):
            if not prompt.visual:
                continue
            inputs = case.collate([prompt])
            answers = []
            for step in (_Pairs("anchor"), _Pairs("mean"), _Pairs("other"), _Pairs("moved")):
                with attach(model, Strategy(step).at(place), adapter=case.adapter):
                    answers.append(case.next_logits(model, inputs))
            anchor, mean, other, moved = answers
            where = f"{case.name}, prompt {number} at {place}"
            require(
                not torch.allclose(anchor, mean, rtol=0, atol=case.tolerance),
                f"{where}: merging changes nothing; does the adapter take anchors instead of "
                "plan(features)?",
            )
            if place == BeforeLLM() and _counts_anew(case, model):
                close(case, moved[0], other[0], f"{where}: tokens in the place of their neighbours")


@promise(ModelCase)
@torch.no_grad()
def check_m9_pictures_are_told_apart(case: ModelCase) -> None:
    """Pictures have ids of their own, so that `random` keeps other tokens of each."""
    model, _, batch = everything(case)
    case = replace(case, scorer=RandomScorer())
    for place in case.placements:
        with attached(case, model, place) as attachment:
            case.next_logits(model, batch)
            kept = chosen_slots(attachment)
        by_count = {len(each): [row for row in kept if len(row) == len(each)] for each in kept}
        for count, rows in by_count.items():
            if len(rows) < 2 or count < 2:
                continue
            require(
                any(row != rows[0] for row in rows),
                f"{case.name} at {place}: {len(rows)} pictures keep the same 'random' tokens "
                f"{rows[0]}; give VisualTokens ids, as ids_of of tokenprune_adapters.kit does",
            )


@promise(ModelCase)
@torch.no_grad()
def check_m10_turns_go_on(case: ModelCase) -> None:
    """A turn on the cache of earlier ones gives what the whole text gives, with pictures or not."""
    if case.turns is None or not case.text:
        return
    model, prompts, _ = everything(case)
    one = next(prompt for prompt in prompts if len(prompt.visual) == 1)
    two = next(prompt for prompt in prompts if len(prompt.visual) > 1)
    text = next(prompt for prompt in prompts if not prompt.visual)
    orders = {
        "text, then a picture": (text, one),
        "a picture, then text": (one, text),
        "a picture, then two": (one, two),
        "text, a picture, text": (text, one, text),
    }
    for place in case.placements:
        for words, order in orders.items():
            turns = [case.collate([prompt]) for prompt in order]
            whole = case.joined(turns)
            expected = case.next_logits(model, whole)
            close(case, case.turns(model, turns)[0], expected[0], f"unattached, {words}")
            with attached(case, model, place):
                expected = case.next_logits(model, whole)
                got = case.turns(model, turns)
            close(case, got[0], expected[0], f"turns at {place}: {words}")


@promise(ModelCase)
@torch.no_grad()
def check_m11_options_do_something(case: ModelCase) -> None:
    """An option that an adapter serves changes what the model computes; others are refused."""
    model, prompts, batch = everything(case)
    known = registry()
    adapter = known.claiming(known.models, model, case.adapter).adapter()
    kinds = {type(place): place for place in case.placements if isinstance(place, Placement)}
    for place in kinds.values():
        for name, values in {
            "positions": ("original", "reindexed"),
            "newline": ("keep", "drop"),
        }.items():
            if not hasattr(place, name):
                continue
            answers = {}
            for value in values:
                try:
                    with attached(case, model, replace(place, **{name: value})):
                        answers[value] = case.next_logits(model, batch)
                except UnsupportedError:
                    continue
            if len(answers) < 2:
                continue
            first, second = answers.values()
            rows = [row for row, prompt in enumerate(prompts) if prompt.visual]
            require(
                any(not same_bits(first[row], second[row]) for row in rows),
                f"{case.name} at {place}: {name}={' and '.join(map(repr, answers))} give the same; "
                f"{type(adapter).__name__} accepts the option and ignores it",
            )


@promise(ModelCase)
@torch.no_grad()
def check_m12_nothing_is_kept_alive(case: ModelCase) -> None:
    """An attached model holds the latest reduction: no cache, no features of earlier pictures."""
    model, prompts, batch = everything(case)
    for place in case.placements:
        where = f"{case.name} at {place}"
        with _newcomers(), attached(case, model, place) as attachment:
            if case.cache is not None and case.text:
                filled = case.cache(model, batch)
                cells = [ref(each) for each in _cells(filled)]
                del filled
                gc.collect()
                alive = sum(cell() is not None for cell in cells)
                require(not alive, f"{where} keeps a KV cache alive that nobody uses")
            sizes = []
            for _ in range(3):
                for prompt in prompts:
                    case.next_logits(model, case.collate([prompt]))
                case.next_logits(model, batch)
                sizes.append(_held(attachment))
            require(
                sizes[2] <= 1.1 * sizes[0] + SLACK,
                f"{where} holds {sizes[0]} bytes of tensors after one round of prompts and "
                f"{sizes[2]} after three: something is kept of every call",
            )
            most = 8 * sum(_bytes(each) for each in tensors_in(_last(attachment)))
            require(
                sizes[2] <= most,
                f"{where} holds {sizes[2]} bytes of tensors beside the latest reduction: what a "
                "hook keeps is alive as long as the model is attached",
            )


@promise(ModelCase)
@torch.no_grad()
def check_m13_kv_bytes_are_reported(case: ModelCase) -> None:
    """The report tells the bytes of KV cache that a prefill stores, and those without reduction."""
    if not case.text or case.cache is None:
        return
    model, prompts, _ = everything(case)
    for place in case.placements:
        for prompt in prompts:
            inputs = case.collate([prompt])
            whole = case.cache(model, inputs)
            vanilla = sum(_bytes(each) for each in _cells(whole))
            with attached(case, model, place) as attachment:
                stored = sum(_bytes(each) for each in _cells(case.cache(model, inputs)))
                report = attachment.report
            where = f"{case.name} at {place}, prompt of {prompt.length} tokens"
            told = report.kv_bytes, report.kv_bytes_vanilla
            if not prompt.visual and told == (0, 0):
                continue
            require(
                told != (0, 0),
                f"{where}: {stored} bytes of KV cache are stored and none reported; call "
                "record.cached(stored, vanilla) after the prefill",
            )
            require(
                told == (stored, vanilla),
                f"{where}: the report says {told} bytes of KV cache, it is {(stored, vanilla)}",
            )


@promise(ModelCase)
@torch.no_grad()
def check_m14_beams_share_a_prompt(case: ModelCase) -> None:
    """A search with beams finds the same with a cache as without, in a batch as alone."""
    if case.beams is None or not case.text:
        return
    model, prompts, batch = everything(case)
    for place in case.placements:
        where = f"{case.name} at {place}"
        with attached(case, model, place):
            cached = case.beams(model, batch, case.steps, True)
            anew = case.beams(model, batch, case.steps, False)
            require(
                torch.equal(cached, anew),
                f"{where}: beams find {cached.tolist()} with a cache and {anew.tolist()} without",
            )
            for row, prompt in enumerate(prompts):
                alone = case.beams(model, case.collate([prompt]), case.steps, True)[0]
                require(
                    torch.equal(alone, cached[row]),
                    f"{where}: beams of prompt {row} find {cached[row].tolist()} in a batch and "
                    f"{alone.tolist()} alone",
                )


@promise(ModelCase)
@torch.no_grad()
def check_m15_half_precision_is_served(case: ModelCase) -> None:
    """A model in bfloat16 is served: all tokens bit for bit, fewer without NaN."""
    model, prompts, batch = everything(case)
    model, batch = copy.deepcopy(model).to(torch.bfloat16), _halved(batch)
    plain = case.next_logits(model, batch)
    for place in case.placements:
        where = f"{case.name} in bfloat16 at {place}"
        with attached(case, model, place, 1.0):
            same = same_bits(case.next_logits(model, batch), plain)
            require(same, f"{where}: a budget of every token changes the logits")
        with attached(case, model, place):
            got = case.next_logits(model, batch)
            require(got.dtype == plain.dtype, f"{where}: logits became {got.dtype}")
            require(bool(got.isfinite().all()), f"{where}: logits are not finite")
            if case.text:
                _, said = case.generate(model, batch, case.steps)
                require(bool(said.isfinite().all()), f"{where}: generated logits are not finite")
            rows = [row for row, prompt in enumerate(prompts) if prompt.visual]
            moved = any(not same_bits(got[row], plain[row]) for row in rows)
            require(moved, f"{where}: half of the tokens change nothing")


@dataclass(frozen=True)
class _Pairs(Reducer):
    """Halves a row: of each two neighbours the first's place stays.

    What stands there is the first itself ("anchor"), their mean ("mean"), or the second ("moved").
    With "other" the second stays in its own place.
    """

    of: str

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        mask = tokens.mask
        rank = mask.cumsum(1) - 1
        last = (rank == mask.sum(1, keepdim=True) - 1) & (rank % 2 == 0)
        first, second = mask & (rank % 2 == 0), mask & ((rank % 2 == 1) | last)
        if self.of == "anchor":
            return Plan.select(first)
        if self.of == "other":
            return Plan.select(second)
        if self.of == "mean":
            return Plan.group((rank // 2).masked_fill(~mask, -1), tokens.sizes)
        kept, taken = Plan.select(first), Plan.select(second)
        weights = torch.zeros(*kept.mask.shape, mask.shape[1], device=mask.device)
        weights.scatter_(2, taken.anchors[:, :, None], 1.0)
        return Plan.of_weights(kept.anchors, kept.mask, weights * kept.mask[:, :, None])


def _counts_anew(case: ModelCase, model: nn.Module) -> bool:
    """Whether positions before the LLM are counted anew, so that only order matters."""
    _, _, batch = everything(case)
    answers = []
    for place in (BeforeLLM(), BeforeLLM("reindexed")):
        try:
            with attached(case, model, place):
                answers.append(case.next_logits(model, batch))
        except UnsupportedError:
            return place == BeforeLLM("reindexed") and not _serves_original(case, model)
    return same_bits(*answers)


def _serves_original(case: ModelCase, model: nn.Module) -> bool:
    try:
        attached(case, model, BeforeLLM("original")).detach()
    except UnsupportedError:
        return False
    return True


def _halved(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs whose floating tensors are in bfloat16."""
    return {
        name: value.to(torch.bfloat16)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


def _cells(cache: object) -> list[Tensor]:
    """Keys and values that a cache holds, wherever they are in it."""
    found: dict[int, Tensor] = {}
    todo, seen = [cache], set()
    while todo:
        each = todo.pop()
        if id(each) in seen or isinstance(each, (type, nn.Module, str)):
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            if each.ndim == 4 and each.is_floating_point():
                found[id(each)] = each
        elif isinstance(each, dict):
            todo += each.values()
        elif isinstance(each, (list, tuple)):
            todo += each
        elif hasattr(each, "__dict__"):
            todo += vars(each).values()
    return list(found.values())


@contextmanager
def _newcomers() -> Iterator[None]:
    """Let the garbage collector see what is made in here alone: the rest takes it long."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _held(attachment: Attachment) -> int:
    """Bytes of the tensors that were made and are alive, beside what the attachment tells."""
    gc.collect()
    own = {each.untyped_storage().data_ptr() for each in tensors_in(_last(attachment))}
    sizes = {}
    for each in gc.get_objects():
        if type(each) is Tensor and each.device.type != "meta":
            storage = each.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _last(attachment: Attachment) -> list[object]:
    last = attachment.last
    return [
        *vars(last.tokens).values(),
        last.plan.anchors,
        last.plan.mask,
        last.scores,
        last.patches,
    ]


def _bytes(each: Tensor) -> int:
    return each.numel() * each.element_size()
