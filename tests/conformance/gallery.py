"""Deliberately wrong strategies, towers and adapters, each with the promise that it breaks.

Most are faults of released research code. A fault is kept as small as it can be: everything else
about the class is right, so that only the check which names the fault has a reason to fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from tokenprune_pocketvlm.adapter import PocketAdapter, Shorten, VisionAdapter
from tokenprune_pocketvlm.testing import cases
from torch import Tensor, nn

from tokenprune import (
    Budgeted,
    ClsAttention,
    Evict,
    Keys,
    ModelAdapter,
    ModelPlugin,
    Observation,
    Placement,
    Plan,
    Record,
    Reducer,
    Removable,
    Scorer,
    Signal,
    Signals,
    Stage,
    Strategy,
    TowerAdapter,
    TowerPlugin,
    VisualTokens,
)
from tokenprune.testing import ModelCase, ReducerCase, ScorerCase, TowerCase


@dataclass(frozen=True)
class Fault:
    """Something wrong.

    Attributes:
        number: the promise that it breaks.
        subject: what to check.
        says: a part of the message by which the check names the fault.
        plugin: the record under which `subject` finds its adapter.
    """

    number: str
    subject: ScorerCase | ReducerCase | TowerCase | ModelCase
    says: str
    plugin: TowerPlugin | ModelPlugin | None = None
    name: str = field(default="")


FAULTS: list[Fault] = []


# Scorers ------------------------------------------------------------------------------------------


def scorer(number: str, says: str) -> Any:
    def enter(cls: type[Scorer]) -> type[Scorer]:
        made = dataclass(frozen=True)(cls)
        FAULTS.append(Fault(number, ScorerCase(made()), says, name=cls.__name__))
        return made

    return enter


def clean(tokens: VisualTokens) -> Tensor:
    """`(batch, tokens, channels)` float32 with zeros in the padding."""
    return tokens.features.float().masked_fill(~tokens.mask[:, :, None], 0)


@scorer("S1", "must return float32")
class Float64Leak(Scorer):
    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        return clean(tokens).double().norm(dim=-1)


@scorer("S1", "must return float32")
class HeadsLeftIn(Scorer):
    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        return clean(tokens)


@scorer("S1", "must be finite")
class ZeroNormIsNan(Scorer):
    """Cosine similarity without an epsilon (ToMe, VisPruner)."""

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        x = clean(tokens)
        return (x / x.norm(dim=-1, keepdim=True)).sum(-1)


@scorer("S1", "must be finite")
class OverflowsInHalf(Scorer):
    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        return clean(tokens).half().square().sum(-1).float()


@scorer("S2", "global random generator")
class GlobalRandom(Scorer):
    """FastV with K = 0."""

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        return torch.rand(tokens.mask.shape)


@scorer("S3", "in a batch and alone")
class FirstMaskForAll(Scorer):
    """Padding of sample 0 used for every row."""

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        x = clean(tokens)
        mean = x.sum(1, keepdim=True) / tokens.mask[0].sum()
        return (x - mean).norm(dim=-1)


@scorer("S3", "in a batch and alone")
class MeanOverTheBatch(Scorer):
    """VTC-CLS: `squeeze(0)` does nothing for two images, and `mean(0)` averages them."""

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        scores = clean(tokens).norm(dim=-1)
        return (scores - scores.mean(0)).contiguous()


@scorer("S4", "padded and not")
class NormalisedOverPadding(Scorer):
    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        scores = clean(tokens).norm(dim=-1)
        return scores.softmax(dim=-1)


@scorer("S4", "padded and not")
class NanFromPadding(Scorer):
    """Padding multiplied by zero instead of left out: 0 * NaN is NaN."""

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        x = tokens.features.float() * tokens.mask[:, :, None]
        return (x - x.sum(1, keepdim=True)).norm(dim=-1)


@scorer("S5", "tokens in the order")
class FirstPatchTakenForCls(Scorer):
    """A tower without [CLS]: every score belongs to the token before."""

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        return clean(tokens).norm(dim=-1).roll(1, dims=1)


@scorer("S6", "changed its input in place: tokens.features")
class WritesIntoFeatures(Scorer):
    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        x = tokens.features.masked_fill_(~tokens.mask[:, :, None], 0)
        return x.float().norm(dim=-1)


@scorer("S6", "left the grad mode changed")
class SwitchesGradOff(Scorer):
    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        torch.set_grad_enabled(False)
        return clean(tokens).norm(dim=-1)


@scorer("S6", "require a gradient")
class KeepsAGraph(Scorer):
    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        weight = torch.ones((), requires_grad=True)
        return clean(tokens).norm(dim=-1) * weight


@scorer("S6", "moved scores from cpu to meta")
class MovesDevice(Scorer):
    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        return clean(tokens).norm(dim=-1).to("meta")


@scorer("S7", "reads what it does not declare: Keys")
class ReadsUndeclaredKeys(Scorer):
    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        return signals[Keys(layer=-1)].float().norm(dim=-1).mean(1)


@scorer("S7", "signals that another step asked for")
class TakesWhatIsThere(Scorer):
    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        scores = clean(tokens).norm(dim=-1)
        for signal in signals:
            scores = scores + signals[signal].sum() * 0 + len(signals)
        return scores


# Reducers -----------------------------------------------------------------------------------------


def reducer(number: str, says: str) -> Any:
    def enter(cls: type[Reducer]) -> type[Reducer]:
        made = dataclass(frozen=True)(cls)
        FAULTS.append(Fault(number, ReducerCase(made(keep=4)), says, name=cls.__name__))
        return made

    return enter


def right(reducer: Any, tokens: VisualTokens, scores: Tensor | None) -> Plan:
    """What `Evict` decides."""
    assert scores is not None
    return Evict(reducer.keep).plan(tokens, scores, Signals())


def merged(keep: int | float, tokens: VisualTokens) -> Tensor:
    """`(batch, tokens)` groups of a right merge: protected ones alone, the rest in turns."""
    groups = torch.full(tokens.mask.shape, -1)
    budget = Evict(keep).budget
    for row, mask in enumerate(tokens.mask):
        real = mask.nonzero().flatten().tolist()
        special = [n for n in real if tokens.protected[row, n]]
        rest = [n for n in real if n not in special]
        room = max(budget.count(len(real)) - len(special), 0)
        if room == 0 and rest:  # more protected tokens than the budget: only they stay
            rest = []
        groups[row, special] = torch.arange(len(special))
        groups[row, rest] = len(special) + torch.arange(len(rest)) % max(room, 1)
    return groups


class Scored(Budgeted, Reducer):
    needs_scores: ClassVar[bool] = True


class Merging(Budgeted, Reducer):
    """Merges tokens in turns; right, if not clever."""

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        return Plan.group(merged(self.keep, tokens), tokens.sizes)


@reducer("P1", "anchors must increase")
class Unsorted(Scored):
    """Kept tokens in the order of their scores (PruMerge)."""

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        plan = right(self, tokens, scores)
        assert scores is not None
        score = scores.gather(1, plan.anchors).masked_fill(~plan.mask, -torch.inf)
        order = score.argsort(dim=1, descending=True, stable=True)
        return Plan(plan.anchors.gather(1, order), plan.mask.gather(1, order), plan.tokens)


@reducer("P1", "no slot of")
class FixedOffset(Scored):
    """The system prompt taken to be 35 tokens long."""

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        plan = right(self, tokens, scores)
        return Plan(plan.anchors + 35, plan.mask, plan.tokens)


@reducer("P1", "keeps padding")
class PaddingTiesWithLowest(Scored):
    """Padding set to -inf, which a real token may score as well."""

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        counts = torch.tensor([Evict(self.keep).budget.count(n) for n in tokens.lengths])
        low = scores.masked_fill(~tokens.mask, -torch.inf)
        order = low.argsort(dim=1, descending=True, stable=True)
        keep = torch.zeros_like(tokens.mask)
        keep.scatter_(1, order, torch.arange(keep.shape[1]) < counts[:, None])
        return Plan.select(keep)


@reducer("P2", "weights must be finite")
class EmptyCluster(Merging):
    """KMeans whose cluster lost its last member: 0 / 0."""

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        plan = super().plan(tokens, scores, signals)
        weights = plan.dense().clone()
        weights[:, -1] = weights[:, -1] * 0 / weights[:, -1].sum(-1, keepdim=True).mul(0)
        return Plan.of_weights(plan.anchors, plan.mask, weights)


@reducer("P2", "empty group")
class ZeroCluster(Merging):
    """The same, with an epsilon that turns the missing center into a zero vector."""

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        plan = super().plan(tokens, scores, signals)
        weights = plan.dense().clone()
        weights[:, -1] = 0
        return Plan.of_weights(plan.anchors, plan.mask, weights)


@reducer("P2", "weights on padding")
class WeighsPadding(Merging):
    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        plan = super().plan(tokens, scores, signals)
        weights = plan.dense() + 1.0
        weights = weights / weights.sum(-1, keepdim=True)
        return Plan.of_weights(plan.anchors, plan.mask, weights * plan.mask[:, :, None])


@reducer("P3", "must leave")
class OneTooMany(Scored):
    """An extra token that the budget does not count (PruMerge)."""

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        budget = Evict(self.keep).budget.count(tokens.mask.shape[1])
        return Evict(budget + 1).plan(tokens, scores, signals)


@reducer("P3", "must leave")
class RoundsDown(Scored):
    """`int(n * ratio)`, which loses a token to the floating point."""

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        keep = self.keep
        if isinstance(keep, float):
            keep = max(int(keep * min(tokens.lengths)), 1)
        return Evict(keep).plan(tokens, scores, signals)


@reducer("P3", "plan.lengths says")
class WrongLengths(Scored):
    """A promise to `Plan.select` that does not hold for short rows."""

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        plan = right(self, tokens, scores)
        plan.__dict__["lengths"] = (plan.mask.shape[1],) * plan.mask.shape[0]
        return plan


@reducer("P4", "merged the protected token")
class MergesProtected(Merging):
    """A newline token averaged into its neighbours."""

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        unprotected = replace(tokens, protected=torch.zeros_like(tokens.protected))
        return super().plan(unprotected, scores, signals)


@reducer("P4", "lost the protected token")
class DropsProtected(Scored):
    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        unprotected = replace(tokens, protected=torch.zeros_like(tokens.protected))
        return right(self, unprotected, scores)


@reducer("P5", "changed")
class AlwaysMerges(Merging):
    """One round of merging even where nothing needs to go (FastV's layers run twice, and so on)."""

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        plan = super().plan(tokens, scores, signals)
        if plan.mask.shape[1] < 2 or not bool(plan.mask.all()) or bool(tokens.protected.any()):
            return plan
        weights = plan.dense().clone()
        weights[:, 0] = (weights[:, 0] + weights[:, 1]) / 2
        return Plan.of_weights(plan.anchors, plan.mask, weights)


@reducer("P6", "not a mean by sizes")
class ForgetsSizes(Merging):
    """The plain mean of what earlier rounds had merged (ToMe's mode "mean")."""

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        return Plan.group(merged(self.keep, tokens), torch.ones_like(tokens.sizes))


@reducer("P6", "stands for")
class LosesTokens(Merging):
    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        groups = merged(self.keep, tokens)
        members = (groups[:, :, None] == groups[:, None, :]).sum(-1)
        late = (groups[:, :, None] == groups[:, None, :]).tril(-1).any(-1)
        return Plan.group(groups.masked_fill((members > 2) & late, -1), tokens.sizes)


@reducer("P7", "keeps")
class ScalesWhatItKeeps(Scored):
    """Kept tokens multiplied by their attention."""

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        plan = right(self, tokens, scores)
        return Plan.of_weights(plan.anchors, plan.mask, plan.dense() * 0.5)


@reducer("P8", "with score")
class KeepsTheLowest(Scored):
    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        assert scores is not None
        return right(self, tokens, -scores)


@reducer("P8", "with score")
class UnstableTies(Scored):
    """`torch.topk`, which promises no order among equal scores; here the last one wins."""

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        assert scores is not None
        mirrored = replace(tokens, mask=tokens.mask.flip(1), protected=tokens.protected.flip(1))
        keep = torch.zeros_like(tokens.mask)
        plan = right(self, mirrored, scores.flip(1))
        rows, places = plan.mask.nonzero(as_tuple=True)
        keep[rows, plan.anchors[rows, places]] = True
        return Plan.select(keep.flip(1))


@reducer("P9", "in the batch and")
class FirstRankingForAll(Scored):
    """The ranking of sample 0 applied to every row (FastV, DivPrune)."""

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        assert scores is not None
        return right(self, tokens, scores[:1].expand_as(scores))


@reducer("P9", "in the batch and")
class StrideOverPadding(Budgeted, Reducer):
    """An even stride over the slots instead of the tokens."""

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        slots = torch.arange(tokens.mask.shape[1])
        return right(self, tokens, ((slots * 5) % 7).float().expand(tokens.mask.shape))


@reducer("P9", "in the batch and by")
class MeanOverTheWholeBatch(Merging):
    """Weights by how much more there is to keep in the longest row."""

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        plan = super().plan(tokens, scores, signals)
        weights = plan.dense() * tokens.mask.sum(1)[:, None, None] / tokens.mask.sum(1).max()
        return Plan.of_weights(plan.anchors, plan.mask, weights)


@reducer("P10", "merged")
class TargetPlusMean(Merging):
    """The target added to the mean of its members, so that its norm doubles (VisionZip)."""

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        plan = super().plan(tokens, scores, signals)
        weights = plan.dense()
        own = Plan(plan.anchors, plan.mask, plan.tokens).dense()
        several = ((weights != 0).sum(-1, keepdim=True) > 1).float()
        return Plan.of_weights(plan.anchors, plan.mask, weights + own * several)


@dataclass(frozen=True, eq=False)
class NormalisingPlan(Plan):
    """Does more to features than it says."""

    def __call__(self, x: Tensor) -> Tensor:
        taken = super().__call__(x)
        return taken * 2 if x.ndim == 3 and x.is_floating_point() else taken


@reducer("P11", "stepwise")
class DoesMoreThanItSays(Scored):
    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        plan = right(self, tokens, scores)
        return NormalisingPlan(plan.anchors, plan.mask, plan.tokens)


@reducer("P12", "keeps")
class StridePerBudget(Budgeted, Reducer):
    """A new even stride for every budget."""

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        keep = torch.zeros_like(tokens.mask)
        for row, mask in enumerate(tokens.mask):
            real = mask.nonzero().flatten()
            count = Evict(self.keep).budget.count(len(real))
            keep[row, real[torch.arange(count) * len(real) // count]] = True
        return Plan.select(keep | tokens.protected & tokens.mask)


@reducer("P13", "global random generator")
class UnseededClusters(Merging):
    """Centers drawn from the global generator."""

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        shuffled = torch.rand(tokens.mask.shape)
        return right(self, tokens, shuffled)


@reducer("P14", "changed its input in place: scores")
class WritesIntoScores(Scored):
    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        assert scores is not None
        return right(self, tokens, scores.masked_fill_(~tokens.mask, -torch.inf))


@reducer("P14", "reads what it does not declare: Keys")
class ReadsUndeclared(Scored):
    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        return right(self, tokens, signals[Keys(layer=-2)].float().sum((1, 3)))


@reducer("P14", "moved a plan")
class PlansElsewhere(Scored):
    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        plan = right(self, tokens, scores)
        return Plan(plan.anchors.to("meta"), plan.mask.to("meta"), plan.tokens, None, plan.lengths)


@reducer("P15", "says that it ignores scores")
class BreaksTiesByScore(Budgeted, Reducer):
    """Reads scores where there are any, and says that it does not."""

    @property
    def ignores_scores(self) -> bool:
        return True

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        scores = torch.zeros(tokens.mask.shape) if scores is None else scores
        return Evict(self.keep).plan(tokens, scores, signals)


# Towers -------------------------------------------------------------------------------------------

TOWER, MODEL = cases()


def tower(number: str, says: str) -> Any:
    def enter(cls: type[TowerAdapter]) -> type[TowerAdapter]:
        name = f"gallery-{len(FAULTS)}"
        assert isinstance(TOWER, TowerCase)
        case = replace(TOWER, name=cls.__name__, adapter=name)
        plugin = TowerPlugin(name, "wrong on purpose", cls, ())
        FAULTS.append(Fault(number, case, says, plugin, cls.__name__))
        return cls

    return enter


class Undo:
    """A handle that calls something."""

    def __init__(self, remove: Any) -> None:
        self.remove = remove


Install = Iterator[Removable]


@tower("T1", "returns something else")
class RoundsTheOutput(VisionAdapter):
    """Casts the features to half on the way."""

    def install(self, tower: Any, *rest: Any) -> Install:
        yield from super().install(tower, *rest)
        yield tower.blocks[0].register_forward_hook(lambda m, a, out: out.half().float())


@tower("T1", "nothing was observed")
class ObservesNothing(VisionAdapter):
    def install(self, tower: Any, *rest: Any) -> Install:
        yield tower.register_forward_hook(lambda m, a, out: None)


class Altered(VisionAdapter):
    """Publishes something else than the tower gave."""

    def alter(self, rows: Tensor) -> Tensor:
        raise NotImplementedError

    def install(
        self,
        tower: nn.Module,
        signals: frozenset[Signal],
        observation: Observation,
        feature_layer: int,
    ) -> Install:
        def change(*_: object) -> None:
            tokens, seen = observation.take()
            observation.begin()
            observation.finish(tokens, {s: self.alter(answer) for s, answer in seen.items()})

        yield from super().install(tower, signals, observation, feature_layer)
        yield tower.register_forward_hook(change)


@tower("T2", "is off by")
class Renormalised(Altered):
    """The [CLS] column left out, and the rest stretched to a sum of one."""

    def alter(self, rows: Tensor) -> Tensor:
        return rows / rows.sum(-1, keepdim=True)


@tower("T2", "outside of [0, 1]")
class LogitsForProbabilities(Altered):
    def alter(self, rows: Tensor) -> Tensor:
        return rows.log()


@tower("T2", "sum to")
class SumsOverHeads(Altered):
    def alter(self, rows: Tensor) -> Tensor:
        return rows.sum(2, keepdim=True).clamp(max=1).expand_as(rows)


@tower("T2", "is off by")
class FirstPictureForAll(Altered):
    def alter(self, rows: Tensor) -> Tensor:
        return rows[:1].expand_as(rows)


@tower("T2", "is off by")
class LayersReversed(Altered):
    def alter(self, rows: Tensor) -> Tensor:
        return rows.flip(1)


@tower("T2", "features")
class FeaturesOfAnotherLayer(VisionAdapter):
    """Positive and negative layer numbers mixed up."""

    def install(self, tower: Any, signals: Any, observation: Any, feature_layer: int) -> Install:
        inner = Observation()
        yield from super().install(tower, signals, inner, feature_layer - 1)

        def publish(*_: object) -> None:
            tokens, seen = inner.take()
            observation.begin()
            observation.finish(tokens, seen)

        yield tower.register_forward_hook(publish)


@tower("T3", "leaves behind")
class TowerHookLeft(VisionAdapter):
    def install(self, tower: Any, *rest: Any) -> Install:
        yield from super().install(tower, *rest)
        tower.blocks[0].register_forward_hook(lambda m, a, out: None)


@tower("T3", "retains what it observed")
class KeepsAttentions(VisionAdapter):
    """A module-level dict shared by hooks (LightCompress)."""

    shared: ClassVar[list[Tensor]] = []

    def install(
        self, tower: Any, signals: Any, observation: Observation, feature_layer: int
    ) -> Install:
        yield from super().install(tower, signals, observation, feature_layer)
        yield tower.register_forward_hook(
            lambda *_: self.shared.extend(observation.signals.values())
        )


@tower("T3", "observing is more than hooks")
class StoresOnTheModule(VisionAdapter):
    """`layer.attn.cached = ...`, read later by whoever knows."""

    def install(self, tower: Any, *rest: Any) -> Install:
        yield from super().install(tower, *rest)
        tower.blocks[0].cached = ()
        yield Undo(lambda: delattr(tower.blocks[0], "cached"))


@tower("T3", "fails after")
class YieldsTooLate(VisionAdapter):
    """Installs everything first and then yields: what it had done by a failure stays."""

    def install(self, tower: Any, *rest: Any) -> Install:
        yield from list(super().install(tower, *rest))


# Models -------------------------------------------------------------------------------------------


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
        shorten = self.shorten()
        yield model.decoder.register_forward_pre_hook(shorten.before, with_kwargs=True)


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
            new = self.prompts.get(kwargs["cache"]) is None
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
            new, logical = self.prompts.get(kwargs["cache"]) is None, args[0].shape[1]
            args, kwargs = super().before(decoder, args, kwargs)
            if new and args[0].shape[1] == logical:
                self.prompts.pop(kwargs["cache"], None)
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
            prompt = self.prompts.get(kwargs["cache"])
            args, kwargs = super().before(decoder, args, kwargs)
            if prompt is not None:
                kwargs["positions"] = positions
            return args, kwargs


@model("M6", "step 1 of a generation")
class CallersMaskAtDecode(Assembled):
    """The newest columns of the caller's mask stand for what is stored."""

    class shorten(Shorten):  # noqa: N801
        def before(self, decoder: Any, args: Any, kwargs: Any) -> Any:
            mask, prompt = kwargs["mask"], self.prompts.get(kwargs["cache"])
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
