"""Names of arguments and output fields of transformers, those of all supported releases.

The adapters spell no such name anywhere else, which a test checks. Where a release renames one, the
new name is put in front of the old one here, and nothing else changes.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar, overload

from torch import Tensor, nn

from tokenprune.errors import UnsupportedError

T = TypeVar("T")


class Argument(Generic[T]):
    """Argument of a call, by position or under the first of its names that is there.

    Args:
        names: names of all supported releases, the newest first.
        optional: True for one that reads as None where it is absent; otherwise that is an error.
    """

    def __init__(self, *names: str, optional: bool = False) -> None:
        self.names = names
        self.optional = optional

    @overload
    def __get__(self, call: None, owner: type) -> Argument[T]: ...
    @overload
    def __get__(self, call: Call, owner: type) -> T: ...
    def __get__(self, call: Call | None, owner: type) -> T | Argument[T]:
        if call is None:
            return self
        name, position = call.find(self.names)
        value: Any = None
        if name is not None:
            value = call.kwargs[name]
        elif position is not None:
            value = call.args[position]
        elif not self.optional:
            raise UnsupportedError(
                f"{call.what} was called without {self}; it got "
                + (", ".join(call.kwargs) or "no arguments by name")
            )
        return value  # type: ignore[no-any-return]

    def __set__(self, call: Call, value: T) -> None:
        name, position = call.find(self.names)
        if name is None and position is not None:
            call.args = (*call.args[:position], value, *call.args[position + 1 :])
            return
        taken = next((each for each in self.names if each in call.signature.names), self.names[0])
        call.kwargs[name or taken] = value

    def __str__(self) -> str:
        return names_of(self)


def names_of(known: Argument[Any] | Field[Any]) -> str:
    """The name of an argument or field, and what it was before, for messages."""
    return " (before: ".join(known.names) + ")" * (len(known.names) - 1)


class Call:
    """Call of a module or method of transformers, as a hook with kwargs sees it.

    Args:
        signature: what is called.
        args: arguments by position.
        kwargs: arguments by name; written to.
    """

    hidden = Argument[Tensor]("hidden_states")
    ids = Argument[Tensor | None]("input_ids", optional=True)
    embeds = Argument[Tensor | None]("inputs_embeds", optional=True)
    mask = Argument[Any]("attention_mask", optional=True)
    positions = Argument[Tensor | None]("position_ids", optional=True)
    rotary = Argument[Any]("position_embeddings")
    cache = Argument[Any]("cache", "past_key_values", optional=True)
    wants_cache = Argument[bool | None]("use_cache", optional=True)
    flash_seams = Argument[Any]("cu_seq_lens_q", "cu_seq_lens_k", optional=True)
    encoded = Argument[Mapping[str, Any] | None]("mm_encoder_outputs", optional=True)
    pixels = Argument[Tensor]("pixel_values", "pixel_values_images")
    pictures = Argument[Any]("pixel_values", "pixel_values_images", optional=True)
    videos = Argument[Tensor | None]("pixel_values_videos", optional=True)
    sizes = Argument[Any]("image_sizes")
    feature_layer = Argument[Any]("vision_feature_layer", optional=True)
    select = Argument[str | None]("vision_feature_select_strategy", optional=True)
    seams = Argument[Tensor]("cu_seqlens")
    pixel_mask = Argument[Tensor | None]("pixel_attention_mask", optional=True)
    image_grid = Argument[Tensor]("image_grid_thw")
    video_grid = Argument[Tensor]("video_grid_thw")
    deepstack = Argument[Any]("deepstack_visual_embeds", optional=True)
    visual_slots = Argument[Tensor | None]("visual_pos_masks", optional=True)
    kept_logits = Argument[Any]("logits_to_keep", optional=True)
    # Of attention functions.
    scale = Argument[float | None]("scaling", optional=True)
    cap = Argument[float | None]("softcap", optional=True)
    sinks = Argument[Tensor | None]("s_aux", optional=True)
    bias = Argument[Tensor | None]("position_bias", optional=True)

    def __init__(self, signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.signature = signature
        self.args = args
        self.kwargs = kwargs

    @property
    def hooked(self) -> Hooked:
        """Arguments as a hook before a module returns them."""
        return self.args, self.kwargs

    @property
    def what(self) -> str:
        """Name of what is called, for messages."""
        return self.signature.what

    def find(self, names: tuple[str, ...]) -> tuple[str | None, int | None]:
        """Name that an argument came with, or its position; a None gives way to a value."""
        given = [name for name in names if name in self.kwargs]
        for name in given:
            if self.kwargs[name] is not None:
                return name, None
        for position, name in enumerate(self.signature.order[: len(self.args)]):
            if name in names:
                return None, position
        return (given[0], None) if given else (None, None)


@dataclass(frozen=True)
class Signature:
    """Arguments that a module's forward, or a method, takes.

    Attributes:
        what: name of the class, or of the method.
        order: names of arguments that may come by position, in order.
        names: names of all arguments.
        required: names of those without a default, in order.
    """

    what: str
    order: tuple[str, ...]
    names: frozenset[str]
    required: tuple[str, ...]

    @classmethod
    def of(cls, called: nn.Module | Callable[..., Any]) -> Signature:
        """The signature of a module's forward, or of a bound method."""
        function = called.forward if isinstance(called, nn.Module) else called
        what = type(called).__name__
        if not isinstance(called, nn.Module):
            what = getattr(called, "__name__", what)  # partial functions have none
        parameters = inspect.signature(function).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        return cls(
            what,
            tuple(each.name for each in parameters if each.kind in kinds),
            frozenset(each.name for each in parameters if each.kind not in many),
            tuple(
                each.name
                for each in parameters
                if each.kind not in many and each.default is each.empty
            ),
        )

    @classmethod
    def of_names(cls, what: str, *order: str) -> Signature:
        """A signature with these names, in order."""
        return cls(what, order, frozenset(order), order)

    def missing(self, *wanted: Argument[Any]) -> list[str]:
        """Names of the wanted arguments that are not taken under any of their names."""
        return [str(each) for each in wanted if self.names.isdisjoint(each.names)]


Hooked = tuple[tuple[Any, ...], dict[str, Any]]
"""What a hook before a module returns: its arguments by position and by name."""


def calls_of(module: nn.Module) -> Callable[[tuple[Any, ...], dict[str, Any]], Call]:
    """Makes a `Call` of what a hook before `module` gets."""
    return partial(Call, Signature.of(module))


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
            f"{type(raw).__name__} has no {names_of(self)}; it has {has}: see `tokenprune doctor`"
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
