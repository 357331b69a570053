"""Names of output fields of transformers, those of all supported releases: see `names.py`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar, overload

from torch import Tensor

from tokenprune.errors import UnsupportedError

from .names import told

T = TypeVar("T")


class Field(Generic[T]):
    """Field of an output, under the first of its names that the output's class has.

    It may hold None, but a class that has it under no name is an error.
    """

    def __init__(self, *names: str) -> None:
        self.names = names

    def name_in(self, raw: object) -> str | None:
        """The name that the class of `raw` uses, or None."""
        fields = getattr(type(raw), "__dataclass_fields__", ())
        return next((name for name in self.names if name in fields), None)

    @overload
    def __get__(self, output: None, owner: type) -> Field[T]: ...
    @overload
    def __get__(self, output: Output, owner: type) -> T | None: ...
    def __get__(self, output: Output | None, owner: type) -> T | Field[T] | None:
        if output is None:  # torch.compile looks at the class
            return self
        name = self.name_in(output.raw)
        if name is None:
            raise self.missing_in(output.raw)
        value: T | None = getattr(output.raw, name)
        return value

    def missing_in(self, raw: object) -> UnsupportedError:
        """The error that says so."""
        has = ", ".join(getattr(type(raw), "__dataclass_fields__", ())) or "no fields"
        return UnsupportedError(
            f"{type(raw).__name__} has no {told(self.names)}; it has {has}: see `tokenprune doctor`"
        )


class Output:
    """Output of a module of transformers. Fields are read here, and replaced in a copy.

    Args:
        raw: output as the module returned it.

    Raises:
        UnsupportedError: it is a plain tuple, whose fields have no names.
    """

    last = Field[Tensor]("last_hidden_state")
    states = Field[tuple[Tensor | None, ...]]("hidden_states")
    cache = Field[Any]("cache", "past_key_values")
    features = Field[Any]("pooler_output")
    deepstack = Field[Any]("deepstack_features")
    shown = (
        Field[Any]("image_outputs", "image_hidden_states"),
        Field[Any]("video_outputs", "video_hidden_states"),
    )

    def __init__(self, raw: Any) -> None:
        if isinstance(raw, (tuple, list)):
            raise UnsupportedError(
                "an output that is a plain tuple cannot be read; leave return_dict at True"
            )
        self.raw = raw

    def replaced(self, **fields: Any) -> Any:
        """A copy with other values in some fields; `self.raw` stays as it is.

        Args:
            fields: values by the names of the attributes of this class.
        """
        named = {}
        for attribute, value in fields.items():
            field: Field[Any] = getattr(Output, attribute)
            name = field.name_in(self.raw)
            if name is None:
                raise field.missing_in(self.raw)
            named[name] = value
        return with_fields(self.raw, named)

    def show(self, shown: Callable[[list[Tensor]], list[Tensor]], required: bool = True) -> Any:
        """A copy in which callers see image features as `shown` makes them, one or several.

        Some models show none, which is an error where they are `required`.

        Up to transformers 5.23 they are a field of their own. Since 5.24 the output holds that of
        the encoder, the very object that `generate` hands to later calls.
        """
        fields: dict[str, Any] = {}
        images, videos = self.shown  # of which models for pictures alone have the first
        if required and images.name_in(self.raw) is None:
            raise images.missing_in(self.raw)
        for field in (images, videos):
            name = field.name_in(self.raw)
            given: Any = None if name is None else getattr(self.raw, name)
            if name is None or given is None:
                continue
            if isinstance(given, Tensor):
                (fields[name],) = shown([given])
            elif isinstance(given, (list, tuple)):
                fields[name] = type(given)(shown(list(given)))
            else:
                inner = Output(given)
                features: Any = inner.features
                many = isinstance(features, (list, tuple))
                seen = shown(list(features) if many else [features])
                fields[name] = inner.replaced(features=seen if many else seen[0])
        return with_fields(self.raw, fields) if fields else self.raw


def with_fields(raw: Any, fields: Mapping[str, Any]) -> Any:
    """A copy of an output of transformers with other values in some fields."""
    made = copy.copy(raw)
    for name, value in fields.items():
        setattr(made, name, value)
    return made
