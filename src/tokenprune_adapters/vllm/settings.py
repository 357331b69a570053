"""Settings of a vLLM engine, validated: what it cannot do with every picture is refused here.

Nothing of vLLM is imported: an engine reads this in the process that takes requests, where no model
is, and again in those that run the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tokenprune.budget import Keep
from tokenprune.errors import AttachError, BudgetError, SpecError, UnsupportedError
from tokenprune.placement import BeforeLLM
from tokenprune.signals import (
    ClsAttention,
    GivenAttention,
    JointClsAttention,
    Keys,
    ReceivedAttention,
    Signals,
)
from tokenprune.spec import parse_schedule, shown
from tokenprune.stage_support import check_signals
from tokenprune.strategy import Reducer, Stage, Strategy
from tokenprune.tokens import VisualTokens

from ..hf.anatomy import feature_layer, patches_per_crop
from ..hf.budgets import budgets_are_for
from ..hf.families import LLAVA
from ..kit.tower_reading import layers_of

ARCHITECTURE = "TokenpruneLlavaForConditionalGeneration"
"""What stands in `hf_overrides={"architectures": [...]}`."""

KEY = "tokenprune"
"""Name of our settings, in `hf_overrides` and in a request's `mm_processor_kwargs`."""

PROVIDED = frozenset({ClsAttention, GivenAttention, JointClsAttention, Keys, ReceivedAttention})
"""What can be read from vLLM's CLIP tower."""


@dataclass(frozen=True)
class Served:
    """Settings of an engine: what is done to every picture.

    Attributes:
        strategy: between the vision tower and the projector.
        tokens: visual tokens of a picture before it.
    """

    strategy: Strategy
    tokens: int

    @classmethod
    def of(cls, config: Any) -> Served:
        """Read the config of a LLaVA-1.5 model with our settings in it.

        Args:
            config: a `LlavaConfig` with an attribute `tokenprune`, which `hf_overrides` put there.

        Raises:
            SpecError, UnknownNameError, BudgetError: a spec that cannot be read.
            UnsupportedError: a spec or a model that vLLM cannot serve compressed; says why.
        """
        stage = _stage(_spec(config))
        _check_model(config)
        check_signals(PROVIDED, stage, f"{ARCHITECTURE} (vLLM)")
        _check_layers(config, stage.strategy)
        for step in stage.strategy.steps:
            if isinstance(step, Reducer):
                _budget(step)
        served = cls(stage.strategy, patches_per_crop(config))
        served.count()
        return served

    def count(self, request: object = None) -> int:
        """Visual tokens that a picture keeps, known before it is seen.

        Args:
            request: what a request says of it, ``{"keep": 32}`` (or a fraction), in place of the
                engine's own budget; None where it says nothing.

        Raises:
            BudgetError: a budget that no picture can be reduced to, or not a budget.
            UnsupportedError: the engine's strategy has several budgets.
        """
        if request is None:
            tokens = self.tokens
            for reducer in self._reducers():
                tokens = _budget(reducer).count(tokens)
            return tokens
        if not isinstance(request, Mapping) or set(request) != {"keep"}:
            raise BudgetError(
                f"a request's mm_processor_kwargs[{KEY!r}] must be {{'keep': count or fraction}}, "
                f"got {request!r}; which scorer ranks the tokens is the engine's to say"
            )
        count = Keep(request["keep"]).count(self.tokens)
        if count == 0:
            raise BudgetError(
                "keep=0 leaves no visual token before the LLM; keep at least 1, or send no picture"
            )
        self.keeping(count)
        return count

    def keeping(self, count: int) -> Strategy:
        """The engine's strategy with `count` for its budget.

        Raises:
            UnsupportedError: it has several budgets, of which `count` could be any.
        """
        if count == self.count():
            return self.strategy
        reducers = self._reducers()
        if len(reducers) > 1:
            raise UnsupportedError(
                f"{shown(self.strategy)!r} has {len(reducers)} budgets, so a request cannot set "
                "one; start the engine with a strategy of one reducer"
            )
        reducer: Any = reducers[0]
        changed = replace(reducer, keep=count)
        return Strategy(*(changed if each is reducer else each for each in self.strategy.steps))

    def reduce(self, tokens: VisualTokens, signals: Signals, counts: Sequence[int]) -> list[Tensor]:
        """`(counts[i], channels)`, what is left of each picture.

        Args:
            tokens: visual tokens of some pictures, a row each.
            signals: what the strategy reads.
            counts: what `count` said of each picture.

        Raises:
            AttachError: a reducer left another number of tokens than its budget says.
        """
        left: dict[int, Tensor] = {}
        for count in sorted(set(counts)):
            rows = [row for row, each in enumerate(counts) if each == count]
            some, read = tokens, signals
            if len(rows) < len(counts):
                some = VisualTokens.of(tokens.features[rows], ids=tokens.ids[rows])
                read = _rows(signals, rows)
            reduction = self.keeping(count)(some, read)
            if reduction.plan.lengths != (count,) * len(rows):
                raise AttachError(
                    f"{shown(self.strategy)!r} left {reduction.plan.lengths} tokens where its "
                    f"budget says {count}; vLLM has reserved the latter"
                )
            left.update(zip(rows, reduction.tokens.features, strict=True))
        return [left[row] for row in range(len(counts))]

    def _reducers(self) -> list[Reducer]:
        return [step for step in self.strategy.steps if isinstance(step, Reducer)]


def check_engine(served: Served, *, embeds: bool, processor_kwargs: Mapping[str, object]) -> None:
    """Refuse options of an engine that contradict `served`.

    Args:
        served: what the engine does.
        embeds: whether it takes features of pictures from its clients.
        processor_kwargs: its own `mm_processor_kwargs`.
    """
    if embeds:
        raise UnsupportedError(
            "features that come from a client (--enable-mm-embeds) have passed no vision tower "
            "here, so there is nothing to score them by; start the engine without, or compress "
            "them where they are made"
        )
    if KEY in processor_kwargs:
        raise UnsupportedError(
            f"the engine's own budget stands in hf_overrides ({{{KEY!r}: {{'prune': "
            f"{shown(served.strategy)!r}}}}}), not in its mm_processor_kwargs; leave out "
            f"{KEY!r} there"
        )


def _spec(config: Any) -> str:
    settings = getattr(config, KEY, None)
    known = isinstance(settings, Mapping) and set(settings) == {"prune"}
    spec = settings["prune"] if known and isinstance(settings, Mapping) else None
    if not isinstance(spec, str):
        raise SpecError(
            f"hf_overrides must say what to do, as {{{KEY!r}: {{'prune': 'cls-attention | "
            f"evict(128)'}}}}, got {KEY!r}: {settings!r}"
        )
    return spec


def _stage(spec: str) -> Stage:
    stages = parse_schedule(spec)
    for stage in stages:
        if not isinstance(stage.placement, BeforeLLM):
            raise UnsupportedError(
                f"{shown(stage)!r} acts inside the LLM. vLLM gives every token of a step one slot "
                "and one position for all layers, so that none can be left out between two of "
                "them; compress '@ before-llm', or use the model in transformers"
            )
        if stage.placement.positions not in (None, "reindexed"):
            raise UnsupportedError(
                f"{shown(stage)!r} wants original positions, but vLLM counts the tokens of a "
                "prompt itself, without gaps; use positions='reindexed'"
            )
    if len(stages) > 1:
        raise UnsupportedError(
            f"{len(stages)} stages before the LLM; join them into one: "
            + " | ".join(shown(stage.strategy) for stage in stages)
        )
    budgets_are_for(LLAVA, stages)
    return stages[0]


def _check_model(config: Any) -> None:
    kind = getattr(config.vision_config, "model_type", None)
    if kind != "clip_vision_model":
        raise UnsupportedError(
            f"the vision tower is a {kind}; in vLLM, tokenprune reads CLIP towers alone"
        )
    if config.vision_feature_select_strategy != "default":
        raise UnsupportedError(
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} keeps [CLS] "
            "among the patches; only 'default' is supported"
        )
    if not isinstance(config.vision_feature_layer, int):
        raise UnsupportedError(
            f"vision_feature_layer={config.vision_feature_layer}: vLLM's LLaVA-1.5 takes features "
            "of one layer"
        )


def _check_layers(config: Any, strategy: Strategy) -> None:
    """Refuse signals of layers that vLLM does not even load: those after the features."""
    blocks = config.vision_config.num_hidden_layers
    last = feature_layer(config) % blocks
    for signal in strategy.signals:
        beyond = [layer for layer in layers_of(signal, last, blocks) if layer > last]
        if beyond:
            raise UnsupportedError(
                f"{signal} reads layer {max(beyond)}, but vLLM's tower ends at layer {last}, "
                f"which gives the features; ask for layers up to {last - blocks}"
            )


def _budget(reducer: Reducer) -> Keep:
    """How many tokens `reducer` leaves, where that can be told without looking."""
    keep = getattr(reducer, "keep", None)
    if keep is None:
        raise UnsupportedError(
            f"how many tokens {shown(reducer)!r} leaves depends on the picture, but vLLM reserves "
            "room for them before it looks at it; give an exact budget, e.g. keep=128"
        )
    return Keep(keep, getattr(reducer, "per", "image"))


def _rows(signals: Signals, rows: list[int]) -> Signals:
    """Signals of some pictures; all signals of a tower have the axis `batch` first."""
    return Signals({signal: answer[rows] for signal, answer in signals.items()})
