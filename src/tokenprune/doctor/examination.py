"""Examination of everything that is installed, or of one model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from itertools import chain

import torch
from torch import nn

from ..errors import PluginError, UnsupportedError
from ..plugins import ModelPlugin, registry
from ..trial import Trial
from ..wrappers import unwrapped
from .compare import compare, compare_model, failure
from .report import Comparison, Examination

Progress = Callable[[str], None]
"""Called with the name of each model before it is compared."""

_LOADING = "loading its trials"


def examine(
    device: str | torch.device = "cpu",
    only: Collection[str] | None = None,
    progress: Progress = lambda name: None,
) -> Examination:
    """Compare a tiny random model of every supported class that is installed.

    Args:
        device: what the models run on.
        only: names of model adapters; None for all.
        progress: told of each model.
    """
    device = torch.device(device)
    found = chain.from_iterable(
        _of_plugin(offer.plugin, device, progress)
        for offer in registry().models
        if only is None or offer.plugin.name in only
    )
    broken = (
        failure(name, "loading the plugin", error)
        for name, error in registry().broken.items()
        if only is None or name in only
    )
    return Examination.of(device, torch.float32, (*found, *broken))


def _of_plugin(
    plugin: ModelPlugin, device: torch.device, progress: Progress
) -> Iterator[Comparison]:
    try:
        trials = _trials(plugin)
    except Exception as error:
        yield failure(plugin.name, _LOADING, error)
        return
    if not trials:
        yield Comparison(plugin.name, "", "no trial", reason="its adapter offers none")
    for trial in trials:
        progress(trial.name)
        yield from compare(trial, device)


def _trials(plugin: ModelPlugin) -> list[Trial]:
    """What a plugin offers; whatever it raises, too."""
    trials = [] if plugin.trials is None else list(plugin.trials())
    for trial in trials:
        if not isinstance(trial, Trial):
            raise PluginError(f"trials of {plugin.name!r} must be of type Trial, got {trial!r}")
    return trials


def examine_model(model: nn.Module, checkpoint: str = "") -> Examination:
    """Compare a model of your own, as it is; its weights and config stay what they were.

    Args:
        model: model of a supported class, in eval mode.
        checkpoint: where it came from, for the report.

    Raises:
        UnsupportedError: no adapter claims it, or its adapter offers no trial.
    """
    model = unwrapped(model)
    name = type(model).__name__
    known = registry()
    plugin = known.claiming(known.models, model, None)
    first = next(model.parameters())
    try:
        trials = _trials(plugin)
    except Exception as error:
        broken = (failure(name, _LOADING, error),)
        return Examination.of(first.device, first.dtype, broken, checkpoint)
    if not trials:
        offering = sorted(o.plugin.name for o in known.models if o.plugin.trials is not None)
        raise UnsupportedError(
            f"the adapter {plugin.name!r} of {name} offers no trial to compare it by; those that "
            f"do: {', '.join(offering) or 'none'}"
        )
    made = tuple(compare_model(name, model, trials[0].questions))
    return Examination.of(first.device, first.dtype, made, checkpoint)
