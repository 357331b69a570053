"""Probes that checks of scorers and of reducers share.

What cannot be seen without an accelerator, or only by chance, is provoked: a tensor that is made
without saying where it goes, values that travel to the host, ties that torch may order as it likes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import MissingSignalError, ShapeError
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
    """See that `call` gives the same when there are signals that another step asked for.

    Among them are signals of the declared kinds with other arguments, which come first.
    """
    other: dict[Signal, Tensor] = {SomebodyElses(): torch.full(inputs.tokens.mask.shape, 1e3)}
    for signal, answer in inputs.signals.items():
        other.update(_siblings(signal, answer))
    more = replace(inputs, signals=Signals({**other, **inputs.signals}))
    require(
        same(call(more), call(inputs)), f"{name} depends on signals that another step asked for"
    )


def _siblings(signal: Signal, answer: Tensor) -> Iterator[tuple[Signal, Tensor]]:
    """A signal of the same kind with one layer more, where it asks for layers."""
    if "layers" not in signal.axes.split() or not any(f.name == "layers" for f in fields(signal)):
        return
    asked: int | tuple[int, ...] = getattr(signal, "layers")  # noqa: B009
    more = asked + 1 if isinstance(asked, int) else (*asked, max(asked) + 7)
    axis = signal.axes.split().index("layers")
    last = answer.narrow(axis, 0, 1).flip(0) + 1e3
    yield replace(signal, layers=more), torch.cat([answer, last], axis)  # type: ignore[call-arg]


@contextmanager
def elsewhere() -> Iterator[None]:
    """Play an accelerator: tensors made without a device land elsewhere, and none may come back.

    While `meta` is the default device, a tensor that is made without saying where cannot meet one
    of the inputs. What would copy values to the host raises.
    """
    with torch.device("meta"), _NoHost():
        yield


class _NoHost(TorchFunctionMode):
    """Refuses what brings a whole tensor to the host."""

    _WAYS = (Tensor.cpu, Tensor.numpy, Tensor.__array__)

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        where = (*args[1:2], kwargs.get("device")) if func is Tensor.to else ()
        if func in self._WAYS or "cpu" in [each for each in where if isinstance(each, str)]:
            name = getattr(func, "__name__", str(func))
            raise AssertionError(f"Tensor.{name} brings values to the host")
        return func(*args, **kwargs)


def works_elsewhere(name: str, call: Callable[[], T]) -> T:
    """What `call` gives where it plays an accelerator.

    Raises:
        AssertionError: it makes a tensor without a device, or brings one to the host.
    """
    try:
        with elsewhere():
            return call()
    except (RuntimeError, NotImplementedError, TypeError, ShapeError) as error:
        raise AssertionError(
            f"{name} makes a tensor without device=tokens.features.device, or brings one to the "
            f"host; on an accelerator: {str(error).splitlines()[0]}"
        ) from error
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}; on an accelerator that fails, or waits") from error


class AwkwardTies(TorchFunctionMode):
    """Orders equal values backwards wherever torch promises no order: `topk`, unstable sorts."""

    _TOPK = (torch.topk, Tensor.topk)
    _SORT = (torch.sort, Tensor.sort)
    _ARGSORT = (torch.argsort, Tensor.argsort)

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._TOPK:
            x, k, dim, largest = _given(args, kwargs, input=None, k=None, dim=-1, largest=True)
            values, indices = _backwards(x, dim, largest)
            return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))
        if func in (*self._SORT, *self._ARGSORT) and not kwargs.get("stable"):
            x, dim, descending = _given(args, kwargs, input=None, dim=-1, descending=False)
            values, indices = _backwards(x, dim, descending)
            return indices if func in self._ARGSORT else torch.return_types.sort((values, indices))
        return func(*args, **kwargs)


def _given(args: Sequence[Any], kwargs: Mapping[str, Any], **defaults: Any) -> list[Any]:
    """Arguments by place or by name, in the order of `defaults`."""
    named = {**defaults, **{name: kwargs[name] for name in defaults if name in kwargs}}
    return list({**named, **dict(zip(defaults, args, strict=False))}.values())


def _backwards(x: Tensor, dim: int, descending: bool) -> tuple[Tensor, Tensor]:
    """Sorted values and their indices, the last of equal ones first."""
    if not x.ndim or not x.shape[dim]:
        return x.clone(), torch.zeros_like(x, dtype=torch.int64)
    values, indices = x.flip(dim).sort(dim=dim, descending=descending, stable=True)
    return values, x.shape[dim] - 1 - indices


def in_float32(inputs: Inputs) -> Inputs:
    """The same numbers in float32, of features and of signals."""
    tokens = replace(inputs.tokens, features=inputs.tokens.features.float())
    return replace(
        inputs, tokens=tokens, signals=Signals({s: x.float() for s, x in inputs.signals.items()})
    )


def rounded(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Numbers rounded to `dtype`, but still in float32."""
    tokens = replace(inputs.tokens, features=inputs.tokens.features.to(dtype).float())
    answers = {s: x.to(dtype).float() for s, x in inputs.signals.items()}
    return replace(inputs, tokens=tokens, signals=Signals(answers))
