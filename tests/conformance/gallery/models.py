"""Wrong models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from tokenprune_pocketvlm.adapter import PocketAdapter, Shorten, VisionAdapter
from tokenprune_pocketvlm.model import IMAGE, Config
from torch import Tensor, nn

from tokenprune import (
    ClsAttention,
    ModelAdapter,
    ModelPlugin,
    Observation,
    Placement,
    Plan,
    Record,
    Stage,
    Strategy,
    VisualTokens,
)
from tokenprune.testing import ModelCase

from .fault import FAULTS, Fault
from .towers import MODEL, Install, Undo


def model(number: str, says: str) -> Any:
    def enter(cls: type[ModelAdapter]) -> type[ModelAdapter]:
        name = f"gallery-{len(FAULTS)}"
        assert isinstance(MODEL, ModelCase)
        case = replace(MODEL, name=cls.__name__, adapter=name)
        plugin = ModelPlugin(name, "wrong on purpose", cls, ())
        FAULTS.append(Fault(number, case, says, plugin, cls.__name__))
        return cls

    return enter


class Reduce:
    """Hooks on the projector: it projects the kept tokens; the others come out as -inf."""

    def __init__(self, strategy: Strategy, observation: Observation, record: Record) -> None:
        self.strategy, self.observation, self.record = strategy, observation, record

    def before(self, projector: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        tokens, signals = self.observation.take()
        with self.record.selecting(tokens.features.device):
            reduction = self.strategy(tokens, signals)
        self.record.reduced(reduction, tokens.lengths)
        features = reduction.tokens.features.view_as(reduction.tokens.features)
        features.plan = reduction.plan
        return (features,)

    def after(self, projector: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        plan: Plan = args[0].plan
        marked = output.new_full((len(output), plan.tokens, output.shape[2]), -torch.inf)
        rows, columns = plan.mask.nonzero(as_tuple=True)
        marked[rows, plan.anchors[plan.mask]] = output[rows, columns]
        return marked


class Assembled(PocketAdapter):
    """`PocketAdapter` from parts that may be exchanged."""

    reduce: ClassVar[type[Reduce]] = Reduce
    shorten: ClassVar[type[Shorten]] = Shorten

    def install(self, model: Any, stages: tuple[Stage, ...], record: Record) -> Install:
        strategy, observation = stages[0].strategy, Observation()
        yield from VisionAdapter().install(model.vision, strategy.signals, observation, -1)
        reduce = self.reduce(strategy, observation, record)
        yield model.projector.register_forward_pre_hook(reduce.before)
        yield model.projector.register_forward_hook(reduce.after)
        shorten = self.shorten(record)
        yield model.decoder.register_forward_pre_hook(shorten.before, with_kwargs=True)
        yield model.register_forward_hook(shorten.cached, with_kwargs=True)


@model("M1", "changes the logits of a prefill")
class RoundsTrip(Assembled):
    """Features through half precision, whatever the budget."""

    class reduce(Reduce):  # noqa: N801
        def after(self, projector: Any, args: Any, output: Tensor) -> Tensor:
            return super().after(projector, args, output.half().float())


@model("M2", "leaves behind")
class HookLeft(Assembled):
    def install(self, model: Any, stages: Any, record: Record) -> Install:
        yield from super().install(model, stages, record)
        model.head.register_forward_hook(lambda m, a, out: None)


@model("M2", "attaching is more than hooks")
class ForwardPatched(Assembled):
    """`model.forward = ...`, put back afterwards as an attribute that shadows the class."""

    def install(self, model: Any, stages: Any, record: Record) -> Install:
        yield from super().install(model, stages, record)
        original = model.decoder.forward
        model.decoder.forward = lambda *args, **kwargs: original(*args, **kwargs)
        yield Undo(lambda: setattr(model.decoder, "forward", original))


@model("M2", "attaching is more than hooks")
class ClassPatched(Assembled):
    """The class is patched, and every other model of it with it (ToMe, VisionZip)."""

    def install(self, model: Any, stages: Any, record: Record) -> Install:
        yield from super().install(model, stages, record)
        cls, original = type(model.decoder), type(model.decoder).forward
        cls.forward = lambda self, *args, **kwargs: original(self, *args, **kwargs)
        yield Undo(lambda: setattr(cls, "forward", original))


@model("M2", "attaching is more than hooks")
class ConfigChanged(Assembled):
    def install(self, model: Any, stages: Any, record: Record) -> Install:
        yield from super().install(model, stages, record)
        before, model.config = model.config, replace(model.config, side=2)
        yield Undo(lambda: setattr(model, "config", before))


def _nudge(weight: Tensor) -> None:
    weight.add_(1e-3)


@model("M2", "running changes more than hooks")
class WeightsRescaled(Assembled):
    def install(self, model: Any, stages: Any, record: Record) -> Install:
        yield from super().install(model, stages, record)
        yield model.head.register_forward_hook(lambda m, a, out: _nudge(m.bias))


@model("M2", "a failed run changes the next one")
class StaleAfterAnException(Assembled):
    """A counter that only a finished forward resets."""

    class shorten(Shorten):  # noqa: N801
        depth = 0

        def before(self, decoder: Any, args: Any, kwargs: Any) -> Any:
            args, kwargs = super().before(decoder, args, kwargs)
            if self.depth:
                args = (args[0] * 2,)
            self.depth += 1
            return args, kwargs

        def done(self, decoder: Any, args: Any, output: Any) -> None:
            self.depth -= 1

    def install(self, model: Any, stages: Any, record: Record) -> Install:
        yield from super().install(model, stages, record)
        (hook,) = model.decoder._forward_pre_hooks.values()
        yield model.decoder.register_forward_hook(hook.__self__.done)


@model("M2", "fails after")
class InstallsBeforeItYields(Assembled):
    def install(self, model: Any, stages: Any, record: Record) -> Install:
        yield from list(super().install(model, stages, record))


@model("M3", "in a batch")
class IgnoresLeftPadding(Assembled):
    """After reduction the padding mask is replaced by ones (FastV)."""

    class shorten(Shorten):  # noqa: N801
        def before(self, decoder: Any, args: Any, kwargs: Any) -> Any:
            args, kwargs = super().before(decoder, args, kwargs)
            kwargs["mask"] = torch.ones_like(kwargs["mask"])
            return args, kwargs


@model("M3", "in a batch")
class FirstChoiceForAll(Assembled):
    """The kept set of image 0 for every image of the batch."""

    class reduce(Reduce):  # noqa: N801
        def before(self, projector: Any, args: Any) -> Any:
            tokens, signals = self.observation.take()
            reduction = self.strategy(tokens, signals)
            self.record.reduced(reduction, tokens.lengths)
            plan = reduction.plan
            same = Plan(plan.anchors[:1].expand_as(plan.anchors).clone(), plan.mask, plan.tokens)
            features = same(tokens.features)
            features.plan = same  # type: ignore[attr-defined]
            return (features,)


@model("M3", "in a batch")
class TextOnlyIsCut(Assembled):
    """As many tokens off every prompt as off the first."""

    class shorten(Shorten):  # noqa: N801
        def before(self, decoder: Any, args: Any, kwargs: Any) -> Any:
            new = self.prompts._stored.get(kwargs["cache"]) is None
            args, kwargs = super().before(decoder, args, kwargs)
            if new and len(args[0]) > 1:
                mask = kwargs["mask"].clone()
                mask[-1, :-1] = False
                kwargs["mask"] = mask
            return args, kwargs


@model("M3", "in a batch")
class AsLongAsBeforeIsUntouched(Assembled):
    """Where the longest prompt has no picture, rows with pictures move in a batch that does not."""

    class shorten(Shorten):  # noqa: N801
        def before(self, decoder: Any, args: Any, kwargs: Any) -> Any:
            new, logical = self.prompts._stored.get(kwargs["cache"]) is None, args[0].shape[1]
            args, kwargs = super().before(decoder, args, kwargs)
            if new and args[0].shape[1] == logical:
                self.prompts._stored.pop(kwargs["cache"], None)
            return args, kwargs


@model("M4", "layers store")
class MasksInsteadOfDropping(Assembled):
    """Dropped tokens are hidden from attention, yet computed and cached."""

    class shorten(Shorten):  # noqa: N801
        def before(self, decoder: Any, args: Any, kwargs: Any) -> Any:
            dropped = args[0][:, :, 0].isneginf()
            args = (args[0].masked_fill(dropped[:, :, None], 0),)
            if dropped.any():
                kwargs["mask"] = kwargs["mask"] & ~dropped
            return args, kwargs


@model("M4", "with the kept tokens")
class OffByOne(Assembled):
    """Scores of one place, features of the next: a [CLS] that was not taken off."""

    class reduce(Reduce):  # noqa: N801
        def before(self, projector: Any, args: Any) -> Any:
            tokens, signals = self.observation.take()
            reduction = self.strategy(tokens, signals)
            self.record.reduced(reduction, tokens.lengths)
            features = reduction.plan(tokens.features.roll(1, dims=1))
            features.plan = reduction.plan  # type: ignore[attr-defined]
            return (features,)


@model("M4", "with the kept tokens")
class FixedStart(Assembled):
    """The picture taken to start at a fixed place of the prompt."""

    class shorten(Shorten):  # noqa: N801
        def before(self, decoder: Any, args: Any, kwargs: Any) -> Any:
            embeds = args[0]
            marks = embeds[:, :, 0].isneginf()
            if marks.any():
                filled = embeds.masked_fill(marks[:, :, None], 0)
                moved = marks.roll(1, dims=1) & kwargs["mask"]
                embeds = filled.masked_fill(moved[:, :, None], -torch.inf)
            return super().before(decoder, (embeds,), kwargs)


@model("M4", "the report says")
class ReportsWhatItWasAsked(Assembled):
    class reduce(Reduce):  # noqa: N801
        def before(self, projector: Any, args: Any) -> Any:
            found = super().before(projector, args)
            plan = Plan.identity(torch.ones(found[0].plan.mask.shape[0], 16, dtype=torch.bool))
            last = self.record.last
            self.record.reduced(replace(last, plan=plan), plan.lengths)
            return found


@model("M5", "accepts")
class AcceptsEverything(Assembled):
    """Falls through to the uncompressed path, silently (VTC-CLS, unknown method)."""

    def provides(self, model: nn.Module, placement: Placement) -> Any:
        return frozenset({ClsAttention})


@model("M5", "leaves behind")
class RefusesTooLate(Assembled):
    """Prepares the model before it looks whether it can."""

    def provides(self, model: nn.Module, placement: Placement) -> Any:
        model.prepared = True  # type: ignore[assignment]
        return super().provides(model, placement)


@model("M6", "step 1 of a generation")
class PositionsNotShifted(Assembled):
    """New tokens count on from the unpruned prompt."""

    class shorten(Shorten):  # noqa: N801
        def before(self, decoder: Any, args: Any, kwargs: Any) -> Any:
            positions = kwargs["positions"]
            prompt = self.prompts._stored.get(kwargs["cache"])
            args, kwargs = super().before(decoder, args, kwargs)
            if prompt is not None:
                kwargs["positions"] = positions
            return args, kwargs


@model("M6", "step 1 of a generation")
class CallersMaskAtDecode(Assembled):
    """The newest columns of the caller's mask stand for what is stored."""

    class shorten(Shorten):  # noqa: N801
        def before(self, decoder: Any, args: Any, kwargs: Any) -> Any:
            mask, prompt = kwargs["mask"], self.prompts._stored.get(kwargs["cache"])
            args, kwargs = super().before(decoder, args, kwargs)
            if prompt is not None:
                kwargs["mask"] = mask[:, : kwargs["mask"].shape[1]].clone()
                kwargs["mask"][:, -1] = True
            return args, kwargs


class Untouched(Reduce):
    """Decides, reports, and projects everything all the same."""

    def before(self, projector: Any, args: Any) -> Any:
        super().before(projector, args)
        return args

    def after(self, projector: Any, args: Any, output: Tensor) -> Any:
        return output


@model("M7", "changes nothing")
class SilentNoOp(Assembled):
    reduce = Untouched


@model("M7", "which token is kept does not matter")
class KeepsTheFirst(Assembled):
    """Keeps as many as asked, always the first ones."""

    class reduce(Reduce):  # noqa: N801
        def before(self, projector: Any, args: Any) -> Any:
            tokens, signals = self.observation.take()
            reduction = self.strategy(tokens, signals)
            self.record.reduced(reduction, tokens.lengths)
            kept = reduction.plan.anchors.shape[1]
            first = torch.arange(kept).expand(len(tokens.mask), kept).clone()
            plan = Plan.of_indices(first, reduction.plan.tokens)
            features = plan(tokens.features)
            features.plan = plan  # type: ignore[attr-defined]
            return (features,)


@model("M7", "reports no image")
class NotEvenHooks(Assembled):
    def install(self, model: Any, stages: Any, record: Record) -> Install:
        return iter(())


@model("M8", "does the adapter take anchors instead of plan(features)?")
class TakesAnchors(Assembled):
    """Features gathered where anchors are, whatever the plan merges."""

    class reduce(Reduce):  # noqa: N801
        def before(self, projector: Any, args: Any) -> Any:
            tokens, signals = self.observation.take()
            reduction = self.strategy(tokens, signals)
            self.record.reduced(reduction, tokens.lengths)
            plan = reduction.plan
            features = Plan(plan.anchors, plan.mask, plan.tokens)(tokens.features)
            features.plan = plan  # type: ignore[attr-defined]
            return (features,)


@model("M8", "tokens in the place of their neighbours")
class MeansEverything(Assembled):
    """A merged token is the mean of the picture."""

    class reduce(Reduce):  # noqa: N801
        def before(self, projector: Any, args: Any) -> Any:
            (features,) = super().before(projector, args)
            plan: Plan = features.plan
            if plan.members is None:
                return (features,)
            mean = features.mean(1, keepdim=True).expand_as(features).clone()
            mean.plan = plan
            return (mean,)


class Renamed(Reduce):
    """Pictures under other ids."""

    def ids(self, tokens: VisualTokens) -> Tensor:
        raise NotImplementedError

    def before(self, projector: Any, args: Any) -> Any:
        tokens, signals = self.observation.take()
        self.observation.begin()
        self.observation.finish(replace(tokens, ids=self.ids(tokens)), signals)
        return super().before(projector, args)


@model("M9", "keep the same 'random' tokens")
class ForgetsIds(Assembled):
    """All pictures have the id 0."""

    class reduce(Renamed):  # noqa: N801
        def ids(self, tokens: VisualTokens) -> Tensor:
            return torch.zeros_like(tokens.ids)


@model("M9", "keep the same 'random' tokens")
class IdOfTheBatch(Assembled):
    """One fingerprint of all pixels of a call."""

    class reduce(Renamed):  # noqa: N801
        def ids(self, tokens: VisualTokens) -> Tensor:
            return tokens.ids.sum().expand_as(tokens.ids).clone()


@model("M10", "turns at")
class OneTurnOnly(Assembled):
    """A cache that has been seen is taken for one that decodes; its pictures stay marked."""

    class shorten(Shorten):  # noqa: N801
        def before(self, decoder: Any, args: Any, kwargs: Any) -> Any:
            known = self.prompts._stored.get(kwargs["cache"])
            if known is None:
                return super().before(decoder, args, kwargs)
            mask = kwargs["mask"]
            kwargs["mask"] = torch.cat([known.mask, mask[:, known.logical :]], dim=1)
            kwargs["positions"] = kwargs["positions"] - known.moved[:, None]
            return args, kwargs


@model("M10", "turns at")
class ForgetsEarlierTurns(Assembled):
    """Positions move by what the latest turn lost, not by what all of them did."""

    class shorten(Shorten):  # noqa: N801
        def before(self, decoder: Any, args: Any, kwargs: Any) -> Any:
            known, positions = self.prompts._stored.get(kwargs["cache"]), kwargs["positions"]
            if known is not None and args[0].shape[1] > 1:
                kwargs["positions"] = positions + known.moved[:, None]
            return super().before(decoder, args, kwargs)


@model("M11", "accepts the option and ignores it")
class IgnoresPositions(Assembled):
    options: ClassVar[dict[str, tuple[object, ...]]] = {"positions": ("original", "reindexed")}

    def provides(self, model: nn.Module, placement: Placement) -> Any:
        return VisionAdapter().provides(model)


@model("M11", "accepts the option and ignores it")
class IgnoresNewlines(Assembled):
    options: ClassVar[dict[str, tuple[object, ...]]] = {"newline": ("drop",)}

    def provides(self, model: nn.Module, placement: Placement) -> Any:
        return VisionAdapter().provides(model)


@model("M12", "keeps a KV cache alive")
class KeepsCaches(Assembled):
    """A plain dict by cache, where a weak one would do."""

    class shorten(Shorten):  # noqa: N801
        def __init__(self, record: Record) -> None:
            super().__init__(record)
            self.known: dict[int, Any] = {}

        def before(self, decoder: Any, args: Any, kwargs: Any) -> Any:
            self.known[id(kwargs["cache"])] = kwargs["cache"]
            return super().before(decoder, args, kwargs)


@model("M12", "something is kept of every call")
class KeepsFeatures(Assembled):
    """Features of every picture in a list."""

    class reduce(Reduce):  # noqa: N801
        def after(self, projector: Any, args: Any, output: Tensor) -> Tensor:
            self.seen = [*getattr(self, "seen", []), output]
            return super().after(projector, args, output)


@model("M12", "beside the latest reduction")
class KeepsTheLatestStates(Assembled):
    """What the decoder gave last, in all layers and many times over, for whoever may want it."""

    class shorten(Shorten):  # noqa: N801
        def before(self, decoder: Any, args: Any, kwargs: Any) -> Any:
            self.latest = args[0].repeat(1, 200, 1)
            return super().before(decoder, args, kwargs)


@model("M13", "and none reported")
class NeverTellsBytes(Assembled):
    class shorten(Shorten):  # noqa: N801
        def cached(self, *args: Any) -> None:
            pass


@model("M13", "the report says")
class SavesNothing(Assembled):
    """Takes what is stored for what the whole prompt would have taken."""

    class shorten(Shorten):  # noqa: N801
        def cached(self, model: Any, args: Any, kwargs: Any, output: Any) -> None:
            stored = output.cache.keys[0].shape[2]
            cells = [*output.cache.keys, *output.cache.values]
            self.prompts.report(self.record, cells, logical=stored)


def pictures_of(inputs: dict[str, Any]) -> list[int]:
    return ((inputs["ids"] == IMAGE).sum(1) // Config().visual_tokens).tolist()


def beams(model: nn.Module, inputs: dict[str, Any], steps: int, use_cache: bool) -> Tensor:
    """`(batch, steps)` ids of a search with two beams, each prompt twice in the batch."""
    twice = {name: inputs[name].repeat_interleave(2, 0) for name in ("ids", "mask")}
    if "pixels" in inputs:
        each = inputs["pixels"].split(pictures_of(inputs))
        twice["pixels"] = torch.cat([part for own in each for part in (own, own)])
    rows = len(inputs["ids"])
    text = twice["ids"][:, :0]
    total = torch.tensor([0.0, -1e9]).repeat(rows)
    given, cache = twice, None
    for _ in range(steps):
        output = model(**given, cache=cache)
        scores = (total[:, None] + output.logits.log_softmax(-1)).reshape(rows, -1)
        total, best = scores.topk(2, dim=1)
        words = output.logits.shape[1]
        parents = (best // words + 2 * torch.arange(rows)[:, None]).flatten()
        total, new = total.flatten(), (best % words).reshape(-1, 1)
        text = torch.cat([text[parents], new], dim=1)
        ones = torch.ones(len(text), text.shape[1], dtype=torch.bool)
        mask = torch.cat([twice["mask"], ones], dim=1)
        if use_cache:
            cache = output.cache
            for layer in range(len(cache.keys)):
                cache.keys[layer] = cache.keys[layer][parents]
                cache.values[layer] = cache.values[layer][parents]
            given = {"ids": new, "mask": mask}
        else:
            given = {**twice, "ids": torch.cat([twice["ids"], text], dim=1), "mask": mask}
    return text[::2]


def searched(number: str, says: str) -> Any:
    def enter(cls: type[ModelAdapter]) -> type[ModelAdapter]:
        entered: type[ModelAdapter] = model(number, says)(cls)
        subject = FAULTS[-1].subject
        assert isinstance(subject, ModelCase)
        FAULTS[-1] = replace(FAULTS[-1], subject=replace(subject, beams=beams))
        return entered

    return enter


@searched("M14", "in a batch and")
class CopiesDiffer(Assembled):
    """Ids count the rows, so that beams of one prompt see other tokens of its picture."""

    class reduce(Renamed):  # noqa: N801
        def ids(self, tokens: VisualTokens) -> Tensor:
            return torch.arange(len(tokens.mask), device=tokens.mask.device)


@searched("M14", "with a cache and")
class SecondRowForAll(Assembled):
    """Beams go on with the padding of one row of their batch."""

    class shorten(Shorten):  # noqa: N801
        def before(self, decoder: Any, args: Any, kwargs: Any) -> Any:
            known = self.prompts._stored.get(kwargs["cache"])
            args, kwargs = super().before(decoder, args, kwargs)
            if known is not None:
                kwargs["mask"] = kwargs["mask"][1:2].expand_as(kwargs["mask"]).clone()
            return args, kwargs


@model("M15", "are not finite")
class OverflowsOnTheWay(Assembled):
    """Kept features through float16, scaled: beyond its largest number in half precision alone."""

    class reduce(Reduce):  # noqa: N801
        def after(self, projector: Any, args: Any, output: Tensor) -> Tensor:
            reduced = args[0].plan.mask.shape[1] < args[0].plan.tokens
            if output.dtype == torch.bfloat16 and reduced:
                output = (output.half() * 60000).to(output.dtype) / 60000
            return super().after(projector, args, output)


@model("M15", "a budget of every token changes the logits")
class RoundsInHalf(Assembled):
    """Centred and moved back, which float64 would forgive."""

    class reduce(Reduce):  # noqa: N801
        def after(self, projector: Any, args: Any, output: Tensor) -> Tensor:
            if output.dtype == torch.bfloat16:
                output = (output - output.mean()) + output.mean()
            return super().after(projector, args, output)
