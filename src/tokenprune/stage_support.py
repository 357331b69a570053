"""Support of a stage by an adapter: signals and options that it serves, and words for the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from .adapter import ModelAdapter
from .errors import UnsupportedError
from .plugins import registry
from .signals import Signal
from .spec import shown
from .strategy import Stage

_OF_STEPS = {"per": "image"}
_OF_PLACEMENTS = ("positions", "newline")


def check_options(adapter: ModelAdapter, stage: Stage, model: str) -> None:
    """Refuse an option that `adapter` does not know: it would be accepted and ignored.

    Raises:
        UnsupportedError: the option, whose it is, and which values are served.
    """
    for where, name, value, default in _given(stage):
        served = tuple(adapter.options.get(name, ()))
        if value not in served:
            values = ", ".join(dict.fromkeys(map(repr, (default, *served))))
            raise UnsupportedError(
                f"{name}={value!r} in {where!r} is not served for {model}: "
                f"{type(adapter).__name__} serves {name}={values}"
            )


def _given(stage: Stage) -> Iterator[tuple[str, str, object, object]]:
    """Options that differ from their default: where, name, value, default."""
    for step in stage.strategy.steps:
        for name, default in _OF_STEPS.items():
            value = getattr(step, name, default)
            if value != default:
                yield shown(step), name, value, default
    for field in dataclasses.fields(stage.placement):
        value = getattr(stage.placement, field.name)
        if field.name in _OF_PLACEMENTS and value != field.default:
            yield shown(stage.placement), field.name, value, field.default


def shown_stages(stages: tuple[Stage, ...]) -> str:
    """The stages as a spec, for people."""
    return "; ".join(map(shown, stages))


def check_signals(provided: frozenset[type[Signal]], stage: Stage, model: str) -> None:
    """Refuse a stage that reads what `model` does not supply; name the scorers that work."""
    missing = {type(signal) for signal in stage.strategy.signals} - provided
    if missing:
        raise UnsupportedError(
            f"{model} cannot supply {names_of(missing)} to {shown_stages((stage,))!r}; it supplies "
            f"{names_of(provided) or 'no signals'}. Scorers that work here: {_scorers(provided)}"
        )


def _scorers(provided: frozenset[type[Signal]]) -> str:
    """Names of the installed scorers that need no more than what is provided."""
    working = []
    for offer in registry().scorers:
        try:
            needed = {type(signal) for signal in offer.plugin.factory().signals}
        except TypeError:  # it needs arguments, so its signals are not known
            continue
        if needed <= provided:
            working.append(offer.plugin.name)
    return ", ".join(sorted(working)) or "none"


def names_of(signals: Iterable[type[Signal]]) -> str:
    """Names of kinds of signal, in alphabetical order."""
    return ", ".join(sorted(signal.__name__ for signal in signals))
