"""Wrong reducers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune import (
    Budgeted,
    ClsAttention,
    Evict,
    Keys,
    Plan,
    Reducer,
    Signal,
    Signals,
    VisualTokens,
)
from tokenprune.testing import ReducerCase

from .fault import FAULTS, Fault


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


@reducer("P14", "signals that another step asked for")
class FirstKeysThatCome(Budgeted, Reducer):
    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset({ClsAttention(layers=2)})

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        found = next(answer for s, answer in signals.items() if isinstance(s, ClsAttention))
        return right(self, tokens, found.float().mean((1, 2)))


@reducer("P16", "Tensor.cpu brings values to the host")
class PlansOnTheHost(Scored):
    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        assert scores is not None
        return right(self, tokens, scores.cpu().to(tokens.mask.device))


@reducer("P16", "without device=tokens.features.device")
class SlotsOnTheHost(Budgeted, Reducer):
    exempt: ClassVar[dict[str, str]] = {"P8": "looks at places"}

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        places = tokens.mask.cumsum(1) * torch.ones(tokens.mask.shape[1])
        return right(self, tokens, -places)


@reducer("P17", "ties decide")
class TopkDecides(Budgeted, Reducer):
    """Merges towards the best, where several are best."""

    exempt: ClassVar[dict[str, str]] = {"P3": "one is left", "P5": "", "P4": ""}

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        norms = tokens.features.float().norm(dim=-1).masked_fill(~tokens.mask, -1)
        best = norms.topk(1, dim=1).indices
        return right(self, tokens, torch.zeros_like(norms).scatter(1, best, 1.0))


@reducer("P17", "ties decide")
class SortsUnstably(Scored):
    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        assert scores is not None
        ranks = scores.masked_fill(~tokens.mask, -torch.inf).argsort(dim=1, descending=True)
        places = ranks.argsort(dim=1, stable=True)
        return right(self, tokens, -places.float())


@reducer("P18", "`keep` is not read")
class AlwaysHalf(Scored):
    exempt: ClassVar[dict[str, str]] = {"P3": "the picture decides"}

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        return Evict(0.5).plan(tokens, scores, signals)


@reducer("P18", "`keep` is not read")
class AlwaysEverything(Budgeted, Reducer):
    exempt: ClassVar[dict[str, str]] = {"P3": "the picture decides"}

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        return Plan.identity(tokens.mask)


@reducer("P19", "give weights")
class WeighsByScore(Scored):
    """Weights are shares of the scores: infinity over infinity."""

    exempt: ClassVar[dict[str, str]] = {"P8": "merges", "P10": "", "P6": "", "P7": ""}

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        assert scores is not None
        plan = right(self, tokens, scores)
        own = scores.masked_fill(~tokens.mask, 0).gather(1, plan.anchors)
        shares = (own / own).nan_to_num(1.0) if bool(own.isfinite().all()) else own / own
        return Plan.of_weights(plan.anchors, plan.mask, plan.dense() * shares[:, :, None])


@reducer("P19", "in the batch and")
class ScalesScores(Scored):
    """Scores over the largest of the batch: beside an infinity everything is equal."""

    exempt: ClassVar[dict[str, str]] = {"P8": "infinity over infinity is no number"}

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        assert scores is not None
        real = scores.masked_fill(~tokens.mask, 0)
        return right(self, tokens, real / real.abs().amax().clamp(min=1))
