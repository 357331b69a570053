"""Cases for checks: scorers, reducers, and how to build towers and models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, nn

from ..errors import SpecError, TokenpruneError
from ..placement import BeforeLLM, Placement
from ..plan import Plan
from ..scorers import RandomScorer
from ..signals import Signal
from ..spec import spec_of
from ..strategy import Reducer, Scorer
from . import conventions
from .inputs import Inputs

Exceptions: TypeAlias = Mapping[str, str]
"""Number of a promise -> why it is not kept."""


@dataclass(frozen=True)
class ScorerCase:
    """A scorer to check.

    Attributes:
        scorer: an instance.
        expected_failures: promises that it is known to break, with reasons; strict.
    """

    scorer: Scorer
    expected_failures: Exceptions = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For test ids."""
        return _called(self.scorer)

    @property
    def exempt(self) -> Exceptions:
        """The opt-outs that the class declares."""
        return self.scorer.exempt


@dataclass(frozen=True)
class ReducerCase:
    """A reducer to check. Where it has a field `keep`, the checks vary it.

    Attributes:
        reducer: an instance.
        expected_failures: promises that it is known to break, with reasons; strict.
    """

    reducer: Reducer
    expected_failures: Exceptions = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For test ids."""
        return _called(self.reducer)

    @property
    def exempt(self) -> Exceptions:
        """The opt-outs that the class declares."""
        return self.reducer.exempt

    @property
    def budgeted(self) -> bool:
        """Whether there is a budget to vary; `keep=None` lets the picture decide."""
        return getattr(self.reducer, "keep", None) is not None

    def keeping(self, keep: int | float) -> Reducer:
        """The reducer with this budget, or as it is where it has none."""
        if not self.budgeted:
            return self.reducer
        made: Reducer = dataclasses.replace(self.reducer, keep=keep)  # type: ignore[type-var]
        return made

    def plan(self, inputs: Inputs, keep: int | float) -> Plan:
        """Its decision."""
        return self.keeping(keep).plan(inputs.tokens, inputs.scores, inputs.signals)


@dataclass(frozen=True)
class TowerCase:
    """Case of a tower adapter: how to build a tiny vision tower and run it.

    Attributes:
        name: for test ids.
        build: function that makes the tower, the same every time, in eval mode, with weights that
            make its
            attention peaked: near-uniform rows let most faults through.
        inputs: function that makes keyword arguments of the tower's forward, for three pictures or
            more.
        signals: requests to observe.
        feature_layer: the block whose output is the features.
        adapter: name of the tower adapter, where several claim the class.
        oracle: `(tower, inputs, signal)` to what the signal must be, derived some other way, e.g.
            from `output_attentions` of eager attention. Optional, and what gives T2 its teeth.
        features: `(tower, inputs)` to the `(batch, tokens, channels)` features. Optional.
        painted: `(inputs, token)` to inputs whose first picture is changed where its token stands.
            By default 4-D inputs are taken for pixels, in a grid of as many patches as tokens.
        run: calls the tower.
        expected_failures: promises that its adapter is known to break, with reasons; strict.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    signals: Sequence[Signal]
    feature_layer: int = -2
    adapter: str | None = None
    oracle: Callable[[nn.Module, dict[str, Any], Signal], Tensor] | None = None
    features: Callable[[nn.Module, dict[str, Any]], Tensor] | None = None
    painted: Callable[[dict[str, Any], int], dict[str, Any]] | None = None
    run: Callable[[nn.Module, dict[str, Any]], Any] = lambda tower, inputs: tower(**inputs)
    expected_failures: Exceptions = field(default_factory=dict)
    exempt: Exceptions = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """One prompt of a `ModelCase`.

    Attributes:
        inputs: whatever `ModelCase.collate` needs to make it a part of a batch.
        length: tokens of the whole prompt, each visual token counted.
        visual: visual tokens of each of its images; empty for a text-only prompt.
    """

    inputs: Any
    length: int
    visual: tuple[int, ...] = ()


@dataclass(frozen=True)
class ModelCase:
    """Case of a model adapter: how to build a tiny model, its prompts, and how it is called.

    The functions default to the conventions of transformers, with LEFT padding.

    Attributes:
        name: for test ids.
        build: function that makes the model, the same every time, in eval mode, with weights that
            make attention
            peaked and logits large: with the usual initialisation most faults are invisible.
        prompts: function that makes at least three prompts of different lengths: one image, two
            images and text only, which must be longer than the one with an image. With a batch of
            one, or without padding, most faults are invisible too.
        collate: function that makes left-padded keyword arguments of forward from prompts.
        placements: where the adapter says that it can act; a tuple is several stages at once.
        unsupported: placements that it must refuse; one that no model can serve is always tried.
        scorer: what ranks; its choice must not depend on the text.
        adapter: name of the model adapter, where several claim the class.
        next_logits: `(model, inputs)` to `(batch, vocabulary)` logits of each prompt's next token.
        generate: `(model, inputs, steps)` to greedy `(batch, steps)` ids and `(batch, steps,
            vocabulary)` logits, with a KV cache; never stops early.
        extend: `(inputs, ids)` to inputs with `(batch, steps)` text ids appended.
        cache_lengths: `(model, inputs)` to the slots that a prefill stores, per layer.
        cache: `(model, inputs)` to the KV cache that a prefill fills; None where there is none.
        turns: `(model, turns)`, the inputs of several turns of one prompt, to the `(1, vocabulary)`
            logits after the last, all on one cache; None for a model that goes on with no cache.
        joined: `(turns)` to inputs of one prompt that says all of the turns.
        beams: `(model, inputs, steps, use_cache)` to the `(batch, steps)` ids of a search with
            beams; None for a model that has none.
        oracle: `(model, prompt, kept, placement, steps)` to the `(steps, vocabulary)` greedy logits
            of one prompt, derived without the adapter: hand-built embeddings of the slots `kept`
            of each image. Optional, and what gives M4 and M6 their teeth.
        text: False for a model that takes one picture a prompt and no text, such as a vision tower
            that reduces inside itself. Its output stands for the logits of every step, its blocks
            for the layers of `cache_lengths`.
        wraps: methods that the adapter must wrap on the instance, because what it needs to know
            passes through them alone and `generate` calls them from outside of any forward:
            ``("model.get_image_features",)``. M2 allows these besides hooks; none may stay.
        steps: tokens to generate.
        tolerance: how far logits may be apart where other kernels compute them.
        expected_failures: promises that its adapter is known to break, with reasons; strict.
    """

    name: str
    build: Callable[[], nn.Module]
    prompts: Callable[[], Sequence[Prompt]]
    collate: Callable[[Sequence[Prompt]], dict[str, Any]]
    placements: Sequence[Placement | tuple[Placement, ...]] = (BeforeLLM(),)
    unsupported: Sequence[Placement] = ()
    scorer: Scorer = RandomScorer()  # noqa: RUF009
    adapter: str | None = None
    next_logits: Callable[[nn.Module, dict[str, Any]], Tensor] = conventions.next_logits
    generate: Callable[[nn.Module, dict[str, Any], int], tuple[Tensor, Tensor]] = (
        conventions.generate
    )
    extend: Callable[[dict[str, Any], Tensor], dict[str, Any]] = conventions.extend
    cache_lengths: Callable[[nn.Module, dict[str, Any]], Sequence[int]] = conventions.cache_lengths
    cache: Callable[[nn.Module, dict[str, Any]], object] | None = conventions.cache
    turns: Callable[[nn.Module, Sequence[dict[str, Any]]], Tensor] | None = conventions.turns
    joined: Callable[[Sequence[dict[str, Any]]], dict[str, Any]] = conventions.joined
    beams: Callable[[nn.Module, dict[str, Any], int, bool], Tensor] | None = conventions.beams
    oracle: Callable[[nn.Module, Prompt, list[list[int]], Placement, int], Tensor] | None = None
    text: bool = True
    wraps: Sequence[str] = ()
    steps: int = 3
    tolerance: float = 1e-4
    expected_failures: Exceptions = field(default_factory=dict)
    exempt: Exceptions = field(default_factory=dict)


Case: TypeAlias = ScorerCase | ReducerCase | TowerCase | ModelCase
Subject: TypeAlias = Case | Scorer | Reducer | type[Scorer] | type[Reducer]


def cases_of(subject: Subject) -> Iterator[Case]:
    """The cases that `subject` is, or describes: instances and classes of steps are wrapped.

    A class is made with its defaults, and with `keep=4` where `keep` has none or is None.

    Raises:
        SpecError: a class that needs other arguments, or nothing that can be checked.
    """
    if isinstance(subject, (ScorerCase, ReducerCase, TowerCase, ModelCase)):
        yield subject
    elif isinstance(subject, type):
        yield from (_wrapped(step) for step in _made(subject))
    else:
        yield _wrapped(subject)


def _wrapped(step: object) -> Case:
    if isinstance(step, Scorer):
        return ScorerCase(step)
    if isinstance(step, Reducer):
        return ReducerCase(step)
    raise SpecError(
        f"checks are for scorers, reducers, TowerCase and ModelCase objects, got {step!r}"
    )


def _made(factory: type) -> Iterator[object]:
    fields: dict[str, object] = {}
    if dataclasses.is_dataclass(factory):
        fields = {field.name: field.default for field in dataclasses.fields(factory)}
    keep = fields.get("keep", 0)
    try:
        if keep is not dataclasses.MISSING:
            yield factory()
        if keep is dataclasses.MISSING or keep is None:
            yield factory(keep=4)
    except (TypeError, TokenpruneError) as error:
        raise SpecError(
            f"{factory.__name__} cannot be made with default arguments ({error}); give the checks "
            "an instance"
        ) from error


def _called(step: Scorer | Reducer) -> str:
    try:
        return spec_of(step)
    except SpecError:  # of no installed plugin
        return type(step).__name__
