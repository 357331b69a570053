"""`Snapshot`: what a model was like, and what is no longer the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor, nn

from ..hooks import Removable
from .inputs import same_bits

_OWN = {"_parameters", "_buffers", "_modules"}
_GLOBALS = {
    "torch.nn.functional": torch.nn.functional,
    "torch.nn.Module": nn.Module,
    "torch.Tensor": Tensor,
}


class Snapshot:
    """Hooks, attributes, classes, configs, weights and buffers of a model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._hooks = dict(_hooks(model))
        self._attributes = dict(_attributes(model))
        self._configs = dict(_configs(model))
        self._classes = dict(_classes(model))
        self._weights = {name: tensor.detach().clone() for name, tensor in _tensors(model)}

    def differences(self, hooks: bool = True) -> list[str]:
        """What has changed since, in words.

        Args:
            hooks: whether more hooks count as a difference.
        """
        found = []
        if hooks:
            now = dict(_hooks(self._model))
            found += [f"hooks in {name}" for name in now if now[name] != self._hooks.get(name, ())]
        found += _changed(self._attributes, dict(_attributes(self._model)), _identical)
        found += _changed(self._classes, dict(_classes(self._model)), _identical)
        found += _changed(self._configs, dict(_configs(self._model)), lambda a, b: a == b)
        found += _changed(self._weights, dict(_tensors(self._model)), _same_tensor)
        return found


def _changed(
    before: Mapping[str, object], now: Mapping[str, object], same: Callable[[object, object], bool]
) -> list[str]:
    names = {**before, **now}
    return [
        name
        for name in names
        if name not in before or name not in now or not same(before[name], now[name])
    ]


def _identical(a: object, b: object) -> bool:
    if a is b:
        return True
    try:
        return type(a) is type(b) and bool(a == b)
    except Exception:  # a comparison that makes no sense, e.g. of tensors of other shapes
        return False


def _same_tensor(a: object, b: object) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and same_bits(a, b)


def _hooks(model: nn.Module) -> Iterator[tuple[str, tuple[object, ...]]]:
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if "hooks" in key and isinstance(value, Mapping):
                yield f"{name or 'the model'}.{key}", tuple(value)
    for key, value in vars(nn.modules.module).items():
        if key.startswith("_global_") and isinstance(value, Mapping):
            yield f"torch's {key}", tuple(value)


def _attributes(model: nn.Module) -> Iterator[tuple[str, object]]:
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in _OWN and "hooks" not in key:
                yield f"{name or 'the model'}.{key}", value


def _configs(model: nn.Module) -> Iterator[tuple[str, object]]:
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key.endswith("config"):
                yield f"{name or 'the model'}.{key}", f"{value!r} {getattr(value, '__dict__', '')}"


def _classes(model: nn.Module) -> Iterator[tuple[str, object]]:
    kinds = {cls for module in model.modules() for cls in type(module).__mro__}
    for cls in kinds:
        if cls is not object:
            for key, value in vars(cls).items():
                if callable(value):
                    yield f"class {cls.__module__}.{cls.__qualname__}.{key}", value
    for where, owner in _GLOBALS.items():
        for key, value in vars(owner).items():
            if callable(value):
                yield f"{where}.{key}", value


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((f"weight {name}", tensor) for name, tensor in model.named_parameters())
    yield from ((f"buffer {name}", tensor) for name, tensor in model.named_buffers())


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor of a nested output, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_in(each)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def same_output(a: object, b: object) -> bool:
    """Whether two nested outputs hold the same tensors, bit for bit."""
    ours, theirs = list(tensors_in(a)), list(tensors_in(b))
    return len(ours) == len(theirs) and all(map(same_bits, ours, theirs))


class Interrupted(Exception):  # noqa: N818
    """Interruption that the checks raise in the middle of things."""


def interrupted_installs(
    install: Callable[[], Iterator[Removable]], snapshot: Snapshot
) -> Iterator[tuple[int, list[str]]]:
    """Fail after every handle in turn, undo what was yielded, and say what is left behind."""
    handles = list(install())
    for handle in reversed(handles):
        handle.remove()
    for count in range(1, len(handles) + 1):
        installing = install()
        taken = [next(installing) for _ in range(count)]
        try:
            throw = getattr(installing, "throw", None)
            if throw is not None:
                throw(Interrupted())
        except (Interrupted, StopIteration):
            pass
        for handle in reversed(taken):
            handle.remove()
        yield count, snapshot.differences()
