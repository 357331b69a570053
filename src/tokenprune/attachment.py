"""`attach` strategies to a model, `observe` a vision tower, `watch` an LLM's attention."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from .errors import AttachError, SpecError, UnsupportedError
from .hooks import Removable
from .observation import Attended, Observation
from .plugins import registry
from .report import Record, Report
from .signals import Signal
from .spec import stages_of
from .stage_support import check_options, check_signals, names_of, shown_stages
from .strategy import Reduction, Stage
from .versions import warn_newer
from .wrappers import unwrapped

_attached: WeakKeyDictionary[nn.Module, Attachment] = WeakKeyDictionary()

_WITH = 3
"""Callers from a function behind `contextmanager` up to the `with`: the function, contextlib."""


class Attachment:
    """Stages at work in a model. A context manager: leaving it, however, restores the model."""

    def __init__(self, model: nn.Module, stages: tuple[Stage, ...], record: Record) -> None:
        self.stages = stages
        self._model = ref(model)
        self._record = record
        self._installed = ExitStack()

    @property
    def spec(self) -> str:
        """The stages as a spec; a step that no plugin offers stands in it as its repr."""
        return shown_stages(self.stages)

    @property
    def report(self) -> Report:
        """Tokens before and after per image, selector time, KV bytes."""
        return self._record.report

    @property
    def last(self) -> Reduction:
        """The latest reduction: its tokens, plan (provenance) and scores.

        A row is what shares a budget; `origins` says what each shows. Pictures come first and then
        videos, as in the report. Copies that `generate` makes of a prompt are left out.
        """
        return self._record.last

    def detach(self) -> None:
        """Remove everything that was installed. Doing it twice is harmless."""
        try:
            self._installed.close()
        finally:
            model = self._model()
            if model is not None and _attached.get(model) is self:
                del _attached[model]

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        return f"Attachment({shown_stages(self.stages)!r})"


def attach(model: nn.Module, *stages: Stage | str, adapter: str | None = None) -> Attachment:
    """Compress the visual tokens of `model` until detached.

    Nothing is assigned to a class, a `forward` or a config. Everything is hooks; beside them, some
    models get a wrapper around a method of the instance that `generate` calls by itself, and
    attention modules whose rows are read a view of their config (the documentation lists all of
    it under "Attaching leaves no trace"). Leaving the context, or calling `detach`, restores the
    model, also after an exception.

    Args:
        model: an unmodified model, e.g. `LlavaForConditionalGeneration`; also inside PEFT's
            adapters, `DistributedDataParallel` or `torch.compile`.
        stages: what to do and where, as stages or specs:
            ``"cls-attention | evict(128) @ before-llm"``, ``"vtc-cls(keep=64)"``.
        adapter: name of the adapter, where several claim the model.

    Returns:
        The attachment, already at work; use it as a context manager.

    Raises:
        UnsupportedError: no adapter for this model, or it cannot serve a stage.
        AttachError: `model`, or another one that shares a part with it, is already attached.
        SpecError, UnknownNameError, BudgetError: a spec that cannot be used.
    """
    parsed = stages_of(stages)
    if not parsed:
        raise SpecError("attach needs at least one stage, e.g. attach(model, 'vtc-cls(keep=128)')")
    model = unwrapped(model)
    known = registry()
    plugin = known.claiming(known.models, model, adapter)
    parts = set(model.modules())
    for other, present in list(_attached.items()):
        if not parts.isdisjoint(other.modules()):
            whose = "" if other is model else f", which has parts of this {type(model).__name__},"
            raise AttachError(
                f"{type(other).__name__}{whose} is already attached with "
                f"{shown_stages(present.stages)!r}; detach it first, or give all stages to one "
                "attach call"
            )
    chosen = plugin.adapter()
    warn_newer()
    for stage in parsed:
        check_signals(chosen.provides(model, stage.placement), stage, type(model).__name__)
        check_options(chosen, stage, type(model).__name__)
    record = Record()
    attachment = Attachment(model, parsed, record)
    _install(attachment._installed, chosen.install(model, parsed, record))
    _attached[model] = attachment
    return attachment


@contextmanager
def observe(
    tower: nn.Module,
    signals: Iterable[Signal],
    *,
    feature_layer: int = -2,
    adapter: str | None = None,
) -> Iterator[Observation]:
    """Read visual tokens and signals from a vision tower, which returns what it always does.

    Args:
        tower: e.g. a `CLIPVisionModel`.
        signals: what to read, e.g. ``[ClsAttention(layers=3)]``.
        feature_layer: index of the block whose output is the features; -2 is LLaVA's choice.
        adapter: name of the tower adapter, where several claim the tower.

    Yields:
        An observation whose `tokens` and `signals` are those of the latest forward pass.

    Raises:
        UnsupportedError: no adapter for this tower, or it cannot give a signal.
    """
    known = registry()
    plugin = known.claiming(known.towers, tower, adapter)
    chosen = plugin.adapter()
    warn_newer(_WITH)
    wanted = frozenset(signals)
    missing = {type(s) for s in wanted} - chosen.provides(tower)
    if missing:
        raise UnsupportedError(
            f"{type(tower).__name__} cannot give {names_of(missing)}; it gives "
            f"{names_of(chosen.provides(tower)) or 'no signals'}"
        )
    observation = Observation()
    with ExitStack() as installed:
        _install(installed, chosen.install(tower, wanted, observation, feature_layer))
        yield observation


@contextmanager
def watch(model: nn.Module, *, adapter: str | None = None) -> Iterator[Attended]:
    """Read what generated tokens attend to among the visual tokens, in every layer of the LLM.

    One row of attention is computed anew for each prompt, layer and pass, beside the model's own
    kernel; the model computes what it always does. Generate token by token (greedily, or by
    sampling): with beams, rows of a pass continue others.

    Args:
        model: a model of which no visual tokens are taken.
        adapter: name of the adapter, where several claim the model.

    Yields:
        What was attended to in the passes of the latest prompts.

    Raises:
        UnsupportedError: no adapter for this model, or it cannot tell.
    """
    known = registry()
    model = unwrapped(model)
    chosen = known.claiming(known.models, model, adapter).adapter()
    attended = Attended()
    warn_newer(_WITH)
    with ExitStack() as installed:
        _install(installed, chosen.watch(model, attended))
        yield attended


def _install(stack: ExitStack, handles: Iterator[Removable]) -> None:
    """Take every handle as it is made; if making one fails, undo the others."""
    _forget_compiled()
    stack.callback(_forget_compiled)
    try:
        for handle in handles:
            stack.callback(handle.remove)
    except BaseException:
        stack.close()
        raise


def _forget_compiled() -> None:
    """Code of `torch.compile` is not checked for hooks that came or went since: compile anew."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
