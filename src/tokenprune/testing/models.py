"""M1 to M7: what every model adapter promises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..attachment import attach
from ..budget import Keep
from ..errors import TokenpruneError, UnsupportedError
from ..hooks import Removable
from ..placement import AfterLayer, Placement
from ..plugins import registry
from ..reducers import Evict
from ..report import Record
from ..scorers import RandomScorer
from ..signals import Signal, Signals
from ..strategy import Scorer, Strategy
from ..tokens import VisualTokens
from .cases import ModelCase, Prompt
from .inputs import same_bits
from .model_probes import HALF, Places, attached, chosen_slots, close, everything, stages_at
from .promises import promise, require
from .snapshot import Interrupted, Snapshot, interrupted_installs


@promise(ModelCase)
@torch.no_grad()
def check_m1_full_budget_changes_nothing(case: ModelCase) -> None:
    """With a budget of every token, a model computes what it does unattached, bit for bit."""
    model, _, batch = everything(case)
    logits, (ids, steps) = case.next_logits(model, batch), case.generate(model, batch, case.steps)
    for placement in case.placements:
        for keep in (1.0, 10**6):
            with attached(case, model, placement, keep):
                got = case.next_logits(model, batch)
                text, said = case.generate(model, batch, case.steps)
            where = f"{case.name} at {placement} with keep={keep}"
            require(same_bits(got, logits), f"{where} changes the logits of a prefill")
            require(torch.equal(text, ids), f"{where} generates {text}, not {ids}")
            require(same_bits(said, steps), f"{where} changes the logits of a generation")


@promise(ModelCase)
@torch.no_grad()
def check_m2_detaching_restores_the_model(case: ModelCase) -> None:
    """Attaching adds hooks and declared wrappers alone; detaching restores all, also on failure."""
    model, _, batch = everything(case)
    expected = case.next_logits(model, batch)
    before = Snapshot(model)
    ran = _modules_in_order(case, model, batch)
    for placement in case.placements:
        where = f"{case.name} at {placement}"
        with attached(case, model, placement):
            during = _undeclared(case, before)
            require(not during, f"{where}: attaching is more than hooks: {during}")
            halved = case.next_logits(model, batch)
            case.generate(model, batch, 2)
            during = _undeclared(case, before)
            require(not during, f"{where}: running changes more than hooks: {during}")
        _restored(case, model, batch, before, expected, where)

        for module in (ran[len(ran) // 3], ran[2 * len(ran) // 3], ran[-1]):
            with attached(case, model, placement):
                _fail_in(case, module, model, batch)
                again = case.next_logits(model, batch)
                require(same_bits(again, halved), f"{where}: a failed run changes the next one")
                _fail_in(case, module, model, batch)
            _restored(case, model, batch, before, expected, f"{where}, after an exception")

        known = registry()
        adapter = known.claiming(known.models, model, case.adapter).adapter()
        stages = stages_at(case, placement, HALF)

        def install(adapter: Any = adapter, stages: Any = stages) -> Iterator[Removable]:
            installing: Iterator[Removable] = adapter.install(model, stages, Record())
            return installing

        for count, left in interrupted_installs(install, before):
            require(not left, f"{where}: an installation that fails after {count} leaves: {left}")
        _restored(case, model, batch, before, expected, f"{where}, after half an installation")


@promise(ModelCase)
@torch.no_grad()
def check_m3_batch_equals_single(case: ModelCase) -> None:
    """A prompt gets the same answer alone and in a padded batch, in any order, with any images."""
    model, prompts, _ = everything(case)
    images = [len(prompt.visual) for prompt in prompts]
    orders = [list(range(len(prompts))), list(reversed(range(len(prompts))))]
    if case.text:
        require(
            {0, 1, 2} <= set(images) and len({prompt.length for prompt in prompts}) > 1,
            f"{case.name} must have prompts of different lengths with one image, two and none",
        )
        orders.append(_where_the_longest_is_text(case, prompts))
    else:
        require(images.count(1) >= 3, f"{case.name} must have three pictures or more")
    for placement in case.placements:
        with attached(case, model, placement):
            single = [_answers(case, model, [prompt]) for prompt in prompts]
            for order in orders:
                first, ids, logits = _answers(case, model, [prompts[n] for n in order])
                for row, number in enumerate(order):
                    what = f"prompt {number} at {placement} in a batch of {order}"
                    close(case, first[row], single[number][0][0], what)
                    close(case, logits[row], single[number][2][0], f"{what}, generating")
                    same = torch.equal(ids[row], single[number][1][0])
                    require(same, f"{case.name}: {what} generates something else")
        for number, prompt in enumerate(prompts):
            if not prompt.visual:
                plain = case.next_logits(model, case.collate([prompt]))[0]
                close(case, single[number][0][0], plain, f"text-only prompt at {placement}")


@promise(ModelCase)
@torch.no_grad()
def check_m4_llm_sees_the_kept_tokens(case: ModelCase) -> None:
    """The language model computes and caches the kept tokens, those and no others, per layer."""
    model, prompts, _ = everything(case)
    for placement in case.placements:
        for prompt in prompts:
            inputs = case.collate([prompt])
            whole = list(case.cache_lengths(model, inputs))
            text, kept = prompt.length - sum(prompt.visual), list(prompt.visual)
            expected = [prompt.length] * len(whole)
            for start in _starts(placement):
                kept = [Keep(HALF).count(visual) for visual in kept]
                expected[start:] = [text + sum(kept)] * len(expected[start:])
            where = f"{case.name} at {placement}, prompt of {prompt.length} tokens"
            with attached(case, model, placement) as attachment:
                got = list(case.cache_lengths(model, inputs))
                require(got == expected, f"{where}: layers store {got}, not {expected}")
                if not prompt.visual:
                    continue
                told = [image.after for image in attachment.report.images]
                require(sum(told) == sum(kept), f"{where}: the report says {told}, not {kept}")
                left = [len(each) for each in attachment.report.kept]
                require(left == told, f"{where}: report.kept has {left} tokens, images say {told}")
                chosen = chosen_slots(attachment)
                logits = case.next_logits(model, inputs)[0]
            if case.oracle is not None and isinstance(placement, Placement):
                oracle = case.oracle(model, prompt, chosen, placement, 1)[0]
                close(case, logits, oracle, f"{where}, with the kept tokens {chosen}")


@promise(ModelCase)
@torch.no_grad()
def check_m5_what_is_unsupported_is_refused(case: ModelCase) -> None:
    """A signal or placement that cannot be served is refused at once, and nothing is installed."""
    model, _, batch = everything(case)
    expected = case.next_logits(model, batch)
    before = Snapshot(model)
    asks = Strategy(_AsksTooMuch(), Evict(HALF))
    stages = [asks.at(place) for place in case.placements if isinstance(place, Placement)]
    for placement in (*case.unsupported, Nowhere()):
        stages += stages_at(case, placement, HALF)
    for stage in stages:
        try:
            attach(model, stage, adapter=case.adapter).detach()
        except UnsupportedError:
            pass
        except TokenpruneError as error:
            raise AssertionError(
                f"{case.name} refuses {stage} with {type(error).__name__} ({error}), not "
                "UnsupportedError"
            ) from error
        else:
            raise AssertionError(f"{case.name} accepts {stage}, which it cannot serve")
        _restored(case, model, batch, before, expected, f"{case.name}, refusing {stage}")


@promise(ModelCase)
@torch.no_grad()
def check_m6_generation_equals_recomputation(case: ModelCase) -> None:
    """Generating with a cache gives what recomputing without one gives, on the same kept tokens."""
    model, prompts, batch = everything(case)
    for placement in case.placements:
        with attached(case, model, placement):
            ids, logits = case.generate(model, batch, case.steps)
            for step in range(case.steps):
                whole = case.extend(batch, ids[:, :step]) if step else batch
                what = f"step {step} of a generation at {placement}"
                close(case, logits[:, step], case.next_logits(model, whole), what)
        if case.oracle is None or not isinstance(placement, Placement):
            continue
        for number, prompt in enumerate(prompts):
            with attached(case, model, placement) as attachment:
                case.next_logits(model, case.collate([prompt]))
                chosen = chosen_slots(attachment) if prompt.visual else []
            oracle = case.oracle(model, prompt, chosen, placement, case.steps)
            close(case, logits[number], oracle, f"generation of prompt {number} at {placement}")


@promise(ModelCase)
@torch.no_grad()
def check_m7_reduction_takes_place(case: ModelCase) -> None:
    """An attached model reduces: answers about images change with what is kept."""
    model, prompts, batch = everything(case)
    plain = case.next_logits(model, batch)
    for placement in case.placements:
        where = f"{case.name} at {placement}"
        answers = []
        for seed in (0, 1):
            seeded = replace(case, scorer=RandomScorer(seed))
            with attached(seeded, model, placement, 1) as attachment:
                answers.append(case.next_logits(model, batch))
                images = attachment.report.images
                require(bool(images), f"{where} reports no image")
                most = max(image.after for image in images)
                require(most == 1, f"{where}: with keep=1 the report says {images}")
        for row, prompt in enumerate(prompts):
            if prompt.visual:
                different = not torch.equal(answers[0][row], plain[row])
                require(different, f"{where}: keeping one token changes nothing for prompt {row}")
        require(
            not torch.equal(answers[0], answers[1]), f"{where}: which token is kept does not matter"
        )


def _where_the_longest_is_text(case: ModelCase, prompts: Sequence[Prompt]) -> list[int]:
    """Prompts with images, and at the end one without that is longer.

    Their batch is as long shortened as it was, although rows with images have moved in it.
    """
    text = max(
        (number for number, prompt in enumerate(prompts) if not prompt.visual),
        key=lambda number: prompts[number].length,
    )
    shorter = [
        number
        for number, prompt in enumerate(prompts)
        if prompt.visual and prompt.length < prompts[text].length
    ]
    require(
        bool(shorter),
        f"{case.name} must have a prompt of text only that is longer than one with an image",
    )
    return [*shorter, text]


def _answers(
    case: ModelCase, model: nn.Module, prompts: Sequence[Prompt]
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = case.collate(prompts)
    return (case.next_logits(model, inputs), *case.generate(model, inputs, case.steps))


def _starts(places: Places) -> list[int]:
    """The first layer of the language model, or of a tower, that each stage makes shorter."""
    stages = places if isinstance(places, tuple) else (places,)
    return sorted(place.layers if isinstance(place, AfterLayer) else 0 for place in stages)


def _undeclared(case: ModelCase, before: Snapshot) -> list[str]:
    return [each for each in before.differences(hooks=False) if each not in case.wraps]


def _restored(
    case: ModelCase,
    model: nn.Module,
    batch: dict[str, Any],
    before: Snapshot,
    expected: Tensor,
    where: str,
) -> None:
    left = before.differences()
    require(not left, f"{where} leaves behind: {left}")
    require(same_bits(case.next_logits(model, batch), expected), f"{where} changes the model")


def _modules_in_order(case: ModelCase, model: nn.Module, batch: dict[str, Any]) -> list[nn.Module]:
    """Modules without children, in the order in which they run."""
    ran: list[nn.Module] = []

    def note(module: nn.Module, args: object) -> None:
        ran.append(module)

    handles = [
        module.register_forward_pre_hook(note)
        for module in model.modules()
        if not any(True for _ in module.children())
    ]
    try:
        case.next_logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return ran


def _fail_in(case: ModelCase, part: nn.Module, model: nn.Module, batch: dict[str, Any]) -> None:
    def fail(module: nn.Module, args: object) -> None:
        raise Interrupted

    handle: RemovableHandle = part.register_forward_pre_hook(fail)
    try:
        case.next_logits(model, batch)
    except Interrupted:
        pass
    finally:
        handle.remove()


@dataclass(frozen=True)
class Nowhere(Placement):
    """A placement that no adapter offers."""

    def check(self, steps: Sequence[object]) -> None:
        pass


@dataclass(frozen=True)
class UnheardOf(Signal):
    """A signal that no adapter supplies."""

    axes: ClassVar[str] = "batch tokens"


@dataclass(frozen=True)
class _AsksTooMuch(Scorer):
    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset({UnheardOf()})

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        return signals[UnheardOf()]
