"""Descriptor of a tensor that is made when somebody reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, overload

from torch import Tensor

Maker: TypeAlias = Callable[[], Tensor]
"""Function that makes a tensor, once."""


class OnRead:
    """Field of a dataclass that takes a tensor, or a function that makes it at the first read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.held = f"_{name}"

    @overload
    def __get__(self, instance: None, owner: type) -> OnRead: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Tensor: ...
    def __get__(self, instance: object | None, owner: type) -> Tensor | OnRead:
        if instance is None:
            raise AttributeError(self.held)  # so that the field has no default
        value: Tensor | Maker = vars(instance)[self.held]
        if not isinstance(value, Tensor):
            value = vars(instance)[self.held] = value()
        return value

    def __set__(self, instance: object, value: Tensor | Maker) -> None:
        vars(instance)[self.held] = value
