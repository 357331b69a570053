"""Reduction inside a vision tower of open_clip: later blocks compute kept tokens only.

A hook before the block at which a stage starts scores, decides, and takes patches out of the
sequence; [CLS] and registers stay in front. Every block after it has fewer tokens to compute, and
the pooling at the end reads what is left, so the tower's output keeps its shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenprune.adapter import ModelAdapter
from tokenprune.budget import Budgeted
from tokenprune.errors import BudgetError, ShapeError, UnsupportedError
from tokenprune.hooks import NotCopyable, Removable
from tokenprune.observation import Observation
from tokenprune.placement import AfterLayer, Placement
from tokenprune.report import Record
from tokenprune.signals import Signal, Signals
from tokenprune.strategy import Stage
from tokenprune.tokens import VisualTokens
from tokenprune.untraced import refuse_traces

from ..kit.fingerprint import ids_of
from ..kit.tower_reading import answers, layers_of
from .tower import Vit, pixels_of, read_block

_COUNT = "count"
"""In a pass's scratch, (this, layer): an empty tensor with as many rows and tokens as there are."""


class OpenClipVisualAdapter(ModelAdapter):
    """`model.visual` of an open_clip model, reduced after some of its blocks."""

    # A picture is a crop here, and `install` says why there are no frames.
    options: ClassVar[Mapping[str, tuple[object, ...]]] = {"per": ("crop", "frame")}

    def provides(self, model: nn.Module, placement: Placement) -> frozenset[type[Signal]]:
        vit = Vit.of(model)
        last = len(vit.blocks) - 1
        if not isinstance(placement, AfterLayer):
            raise UnsupportedError(
                f"{vit.name} does not offer {placement!r}; it offers 'after-layer(1)' to "
                f"'after-layer({last})', which make the tower itself faster. For visual tokens of "
                "another model use observe(tower, signals)"
            )
        if placement.layers > last:
            raise UnsupportedError(
                f"{placement!r} leaves no block of {vit.name} to save; it has {last + 1} blocks "
                f"and offers 'after-layer(1)' to 'after-layer({last})'"
            )
        if placement.positions != "original":
            raise UnsupportedError(
                f"{placement!r} would number patches anew, but {vit.name} gives them their "
                "positions before its first block; leave positions='original'"
            )
        return vit.block_signals

    def install(
        self, model: nn.Module, stages: tuple[Stage, ...], record: Record
    ) -> Iterator[Removable]:
        vit = Vit.of(model)
        _check_budgets(vit, stages)
        observation = Observation()
        steps = _steps(vit, stages, observation, record)
        passes = _Pass(vit, observation, record)
        yield model.register_forward_pre_hook(passes.begin, with_kwargs=True)
        yield model.register_forward_hook(passes.end, always_call=True)
        asked: dict[int, set[type[Signal]]] = {}
        for step in steps.values():
            for signal, layers in step.wanted.items():
                for layer in layers:
                    asked.setdefault(layer, set()).add(type(signal))
        for number, kinds in asked.items():
            yield from read_block(vit, number, kinds, observation)
        for number, block in enumerate(vit.blocks):
            if number in steps:
                yield block.register_forward_pre_hook(steps[number].before, with_kwargs=True)
            if number >= min(steps):
                yield block.register_forward_pre_hook(passes.turn, with_kwargs=True)


class _Pass(NotCopyable):
    """Hooks for what belongs to a whole pass of the tower."""

    def __init__(self, vit: Vit, observation: Observation, record: Record) -> None:
        self.vit = vit
        self.observation = observation
        self.record = record

    def begin(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.vit.check_call()
        if getattr(self.vit.runner, "grad_checkpointing", False) and torch.is_grad_enabled():
            raise UnsupportedError(
                f"gradient checkpointing runs blocks of {self.vit.name} once more after the pass "
                "in which tokens were chosen; switch it off "
                "(model.set_grad_checkpointing(False)), or run under torch.no_grad()"
            )
        self.observation.begin()
        self.observation.scratch["pixels"] = pixels_of(args, kwargs)

    def end(self, tower: nn.Module, args: object, output: object) -> None:
        if self.observation.running and output is not None:  # None after an exception
            shapes = {
                key[1]: tuple(tensor.shape)
                for key, tensor in self.observation.scratch.items()
                if isinstance(key, tuple) and key[0] == _COUNT
            }
            counts = {layer: (shape[1],) * shape[0] for layer, shape in sorted(shapes.items())}
            self.record.counted(counts[0], counts)
        self.observation.forget()

    def turn(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give kept patches the rotary embedding."""
        rope, scratch = kwargs.get("rope"), self.observation.scratch
        if rope is not None and "patches" in scratch:
            kwargs = {**kwargs, "rope": _take_rope(rope, scratch["patches"])}
        return args, kwargs


@dataclass(frozen=True, eq=False)
class _Step(NotCopyable):
    """Hook before the block at which a stage starts.

    Attributes:
        vit: the tower.
        stage: what to do.
        start: number of the block.
        since: number of the block at which the stage before started, 0 if there is none.
        wanted: signals, and the layers that they ask about.
        observation: where the pass keeps its tensors.
        record: where to note what was done.
    """

    vit: Vit
    stage: Stage
    start: int
    since: int
    wanted: dict[Signal, tuple[int, ...]]
    observation: Observation
    record: Record

    def before(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not self.observation.running:
            raise UnsupportedError(
                f"blocks of {self.vit.name} ran outside of its own forward "
                "(forward_intermediates?), where tokens that are missing would be taken for "
                "others; call the tower itself, or detach first"
            )
        refuse_traces()
        self.vit.check_mask(kwargs)
        scratch, hidden = self.observation.scratch, self.vit.batched(args[0])
        front, patches = hidden[:, : self.vit.prefix], hidden[:, self.vit.prefix :]
        with self.record.selecting(hidden.device), torch.no_grad():
            tokens = VisualTokens.of(
                patches,
                patches=scratch.get("patches"),
                sizes=scratch.get("sizes"),
                ids=ids_of(scratch["pixels"], hidden.device),
            )
            reduction = self.stage.strategy(tokens, Signals(answers(self.wanted, scratch)))
        plan = reduction.plan
        if len(set(plan.lengths)) > 1:
            raise UnsupportedError(
                f"the stage at after-layer({self.start}) keeps {min(plan.lengths)} to "
                f"{max(plan.lengths)} tokens of the pictures of one batch, and {self.vit.name} has "
                "no mask for the difference; use a fixed budget such as evict(0.5), or batches of "
                "one picture"
            )
        self.record.decided(reduction)
        scratch.setdefault((_COUNT, 0), plan.anchors.new_empty(*tokens.mask.shape, 0))
        scratch[_COUNT, self.start] = plan.anchors.new_empty(*plan.anchors.shape, 0)
        if plan.is_identity:
            return args, kwargs
        scratch["patches"], scratch["sizes"] = reduction.tokens.patches, reduction.tokens.sizes
        # The decision takes no part in autograd; what it does to the patches does.
        kept = plan(patches) if patches.requires_grad else reduction.tokens.features
        shorter = self.vit.batched(torch.cat([front, kept], dim=1))
        return (shorter, *args[1:]), kwargs


def _steps(
    vit: Vit, stages: tuple[Stage, ...], observation: Observation, record: Record
) -> dict[int, _Step]:
    """The stages by the number of the block at which they start, in order."""
    found: dict[int, Stage] = {}
    for stage in stages:
        assert isinstance(stage.placement, AfterLayer)
        start = stage.placement.layers
        if start in found:
            raise UnsupportedError(
                f"two stages at after-layer({start}); join their steps into one stage with '|'"
            )
        found[start] = stage
    steps: dict[int, _Step] = {}
    since = 0
    for start in sorted(found):
        wanted = {s: _layers(vit, s, start, since) for s in found[start].strategy.signals}
        steps[start] = _Step(vit, found[start], start, since, wanted, observation, record)
        since = start
    return steps


def _layers(vit: Vit, signal: Signal, start: int, since: int) -> tuple[int, ...]:
    """Absolute layers of `signal` at block `start`: -1 is the latest that has run before it."""
    try:
        layers = layers_of(signal, start - 1, start)
    except ShapeError:
        layers = ()
    if not layers or min(layers) < since:
        run = start - since
        raise UnsupportedError(
            f"{signal} at after-layer({start}) of {vit.name} must ask about layers that have run "
            f"on the same tokens: there are {run} ({since} to {start - 1}), so layers=1 to "
            f"layers={run}, or {since - start} to -1 by number"
        )
    return layers


def _check_budgets(vit: Vit, stages: tuple[Stage, ...]) -> None:
    for step in (step for stage in stages for step in stage.strategy.steps):
        if not isinstance(step, Budgeted):
            continue
        if step.per == "frame":
            raise UnsupportedError(f"per='frame' in {step!r}: a tower has no frames")
        if step.keep == 0 and vit.needs_patches:
            raise BudgetError(
                f"{step!r} leaves {vit.name} nothing to pool: its output is made of "
                "patches, not of [CLS]; keep at least 1"
            )


def _take_rope(rope: Tensor, patches: Tensor) -> Tensor:
    """Sines and cosines of the given `patches`, such that they fit queries of every head.

    Args:
        rope: `(tokens, channels)`, or `(heads, tokens, channels)` where heads differ.
        patches: `(batch, kept)`.

    Returns:
        `(batch, 1 or heads, kept, channels)`.
    """
    return (
        rope[..., patches, :].unsqueeze(1)
        if rope.ndim == 2
        else (rope[:, patches, :].transpose(0, 1))
    )
