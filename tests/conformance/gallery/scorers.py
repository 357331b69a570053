"""Wrong scorers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenprune import (
    ClsAttention,
    Keys,
    Scorer,
    Signal,
    Signals,
    VisualTokens,
)
from tokenprune.testing import ScorerCase

from .fault import FAULTS, Fault


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


@scorer("S7", "signals that another step asked for")
class TakesTheFirstOfItsKind(Scorer):
    """Declares one number of layers, and reads whatever of that kind comes first."""

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset({ClsAttention(layers=2)})

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        found = next(answer for s, answer in signals.items() if isinstance(s, ClsAttention))
        return found.float().mean((1, 2))


@scorer("S7", "reads what it does not declare: ClsAttention(layers=1)")
class ReadsOtherArguments(Scorer):
    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset({ClsAttention(layers=2)})

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        wanted = ClsAttention(layers=1)
        rows = signals[wanted] if wanted in signals else signals[ClsAttention(layers=2)]
        return rows.float().mean((1, 2))


@scorer("S8", "half precision and in float32")
class CastsAtTheEnd(Scorer):
    """Computes in the model's dtype, and casts what comes out."""

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        x = tokens.features.masked_fill(~tokens.mask[:, :, None], 0)
        return (x * x).sum(-1).float()


@scorer("S8", "rounds them itself")
class CastsAtTheStart(Scorer):
    """Half precision, whatever it is given (VTC-CLS ranks so)."""

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        return clean(tokens).clamp(-1e3, 1e3).bfloat16().float().abs().sum(-1)


@scorer("S8", "half precision and in float32")
class AttentionInHalf(Scorer):
    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset({ClsAttention(layers=3)})

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        return signals[ClsAttention(layers=3)].mean((1, 2)).float()


@scorer("S9", "Tensor.cpu brings values to the host")
class WorksOnTheHost(Scorer):
    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        x = clean(tokens)
        return x.cpu().norm(dim=-1).to(x.device)


@scorer("S9", "Tensor.numpy brings values to the host")
class WorksInNumpy(Scorer):
    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        return torch.from_numpy((clean(tokens).numpy() ** 2).sum(-1))


@scorer("S9", "without device=tokens.features.device")
class CountsOnTheHost(Scorer):
    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        return clean(tokens).norm(dim=-1) * torch.tensor(2.0)[None].expand(1)


@scorer("S9", "without device=tokens.features.device")
class RangeOnTheHost(Scorer):
    exempt: ClassVar[dict[str, str]] = {"S5": "looks at places"}

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        return clean(tokens).norm(dim=-1) + torch.arange(tokens.mask.shape[1]) * 0.5


@scorer("S10", "ties decide")
class RanksUnstably(Scorer):
    """A rank for a score, where equal norms have no order."""

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        norms = clean(tokens).norm(dim=-1).masked_fill(~tokens.mask, torch.inf)
        return norms.argsort(dim=1).argsort(dim=1, stable=True).float()


@scorer("S10", "ties decide")
class MarksTheTop(Scorer):
    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        norms = clean(tokens).norm(dim=-1).masked_fill(~tokens.mask, -1)
        best = norms.topk(1, dim=1).indices
        return torch.zeros_like(norms).scatter(1, best, 1.0)
