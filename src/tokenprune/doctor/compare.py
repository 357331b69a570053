"""Comparison of one model, attached, with a vanilla run by hand."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from ..attachment import attach
from ..errors import UnsupportedError
from ..trial import Answer, Cut, Questions, Trial
from .report import Comparison, Outcome

CLEAR = 1.5
"""A wrong plan must move logits by so many times what is allowed, or nothing is shown."""


def compare(trial: Trial, device: torch.device) -> Iterator[Comparison]:
    """Build the tiny model of `trial` and compare it; never raises."""
    try:
        if find_spec(trial.module) is None:
            reason = f"there is no module {trial.module}"
            yield Comparison(trial.name, "", "not installed", reason=reason)
            return
        model = trial.build().to(device)
    except Exception as error:
        yield failure(trial.name, "building it", error)
        return
    yield from compare_model(trial.name, model, trial.questions)


@torch.no_grad()
def compare_model(
    name: str, model: nn.Module, ask: Callable[[nn.Module], Questions]
) -> Iterator[Comparison]:
    """Compare `model` by the questions that `ask` makes for it; never raises."""
    try:
        questions = ask(model)
        cuts = list(questions.cuts)
    except Exception as error:
        yield failure(name, "reading it by hand", error)
        return
    if not cuts:
        reason = "its trial makes no cuts, so nothing was compared"
        yield Comparison(name, "nowhere", "failed", reason=reason)
    for cut in cuts:
        try:
            answer = _answer(model, cut, questions)
        except Exception as error:
            yield failure(name, cut.where, error, cut.spec)
            continue
        try:
            yield _compared(name, cut, answer, _epsilon(model))
        except Exception as error:
            yield failure(name, f"{cut.where}, by hand", error, cut.spec)


def failure(name: str, where: str, error: Exception, spec: str = "") -> Comparison:
    """A comparison that an error has ended."""
    reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
    told = "".join(traceback.format_exception(error))
    outcome: Outcome = "refused" if isinstance(error, UnsupportedError) else "failed"
    return Comparison(name, where, outcome, spec, reason=reason, traceback=told)


def _answer(model: nn.Module, cut: Cut, questions: Questions) -> Answer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report names versions itself
        if not cut.spec:
            return questions.ask()
        with attach(model, cut.spec):
            return questions.ask()


def _compared(name: str, cut: Cut, answer: Answer, epsilon: float) -> Comparison:
    expected = cut.by_hand(answer.text, 0)
    if expected.shape != answer.logits.shape:
        got, wanted = tuple(answer.logits.shape), tuple(expected.shape)
        reason = f"the model returns logits of shape {got}, by hand it is {wanted}"
        return Comparison(name, cut.where, "failed", cut.spec, reason=reason)
    gap = _gap(answer.logits, expected)
    # A third of the digits is left to rounding, which grows with depth: far more than was seen, and
    # far less than what a wrong plan does.
    tolerance = epsilon ** (2 / 3) * float(expected.abs().max())
    sensitivity = _gap(cut.by_hand(answer.text, 1), expected) if cut.spec else None
    outcome: Outcome = "ok"
    reason = ""
    if not gap <= tolerance:  # nor is NaN
        outcome = "failed"
        reason = f"logits differ by {gap:.2g}, and {tolerance:.2g} is allowed"
    elif sensitivity is not None and sensitivity < CLEAR * tolerance:
        outcome = "unclear"
        reason = (
            f"a wrong plan would move logits by {sensitivity:.2g}, and rounding may by "
            f"{tolerance:.2g}"
        )
    return Comparison(*(name, cut.where, outcome, cut.spec), *(gap, tolerance, sensitivity, reason))


def _gap(logits: Tensor, expected: Tensor) -> float:
    return float((logits.double() - expected.double()).abs().max())


def _epsilon(model: nn.Module) -> float:
    """Of the coarsest dtype that the model computes in."""
    return max(
        torch.finfo(weight.dtype).eps for weight in model.parameters() if weight.is_floating_point()
    )
