"""Probes that checks of scorers and of reducers share."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from ..errors import MissingSignalError
from ..signals import Signal, Signals
from ..tokens import VisualTokens
from .inputs import FIELDS, Inputs, Spy, same_bits
from .promises import require

T = TypeVar("T")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every global generator, see that none moves, and put them back."""
    before = random.getstate(), torch.get_rng_state()
    try:
        random.seed(seed)
        torch.manual_seed(seed)
        during = random.getstate(), torch.get_rng_state()
        yield
        still = random.getstate() == during[0] and torch.equal(torch.get_rng_state(), during[1])
        require(still, "a global random generator was used; make the seed a field")
    finally:
        random.setstate(before[0])
        torch.set_rng_state(before[1])


def untouched(name: str, inputs: Inputs, call: Callable[[Inputs], object]) -> None:
    """See that `call` leaves the bits of its inputs, the grad mode and autocast alone."""
    before, grad = inputs.copy().tensors(), torch.is_grad_enabled()
    try:
        call(inputs)
        require(torch.is_grad_enabled() == grad, f"{name} left the grad mode changed")
    finally:
        torch.set_grad_enabled(grad)
    after = inputs.tensors()
    changed = [which for which in before if not same_bits(before[which], after[which])]
    require(not changed, f"{name} changed its input in place: {', '.join(changed)}")


def on_devices(inputs: Inputs) -> Iterator[Inputs]:
    """The inputs on every kind of device that there is here."""
    yield inputs
    if torch.cuda.is_available():
        yield Inputs(
            VisualTokens(*(getattr(inputs.tokens, field).cuda() for field in FIELDS)),
            Signals({signal: answer.cuda() for signal, answer in inputs.signals.items()}),
            None if inputs.scores is None else inputs.scores.cuda(),
        )


@dataclass(frozen=True)
class SomebodyElses(Signal):
    """A signal that another step asked for."""

    axes: ClassVar[str] = "batch tokens"


def reads_only(
    name: str, declared: frozenset[Signal], inputs: Inputs, call: Callable[[Inputs], object]
) -> None:
    """See that `call` reads no signals but `declared`."""
    spy = Spy(inputs.signals)
    try:
        call(replace(inputs.copy(), signals=spy))
    except MissingSignalError as error:
        raise AssertionError(f"{name} reads what it does not declare: {error}") from error
    more = spy.read - declared
    require(not more, f"{name} reads what it does not declare: {', '.join(map(repr, more))}")


def ignores_others(
    name: str, inputs: Inputs, call: Callable[[Inputs], T], same: Callable[[T, T], bool]
) -> None:
    """See that `call` gives the same when there are signals that another step asked for."""
    other: dict[Signal, Tensor] = {SomebodyElses(): torch.full(inputs.tokens.mask.shape, 1e3)}
    more = replace(inputs, signals=Signals({**other, **inputs.signals}))
    require(
        same(call(more), call(inputs)), f"{name} depends on signals that another step asked for"
    )
