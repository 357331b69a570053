"""Names of arguments of transformers, those of all supported releases.

The adapters spell no such name but here and in `outputs.py`, which a test checks. Where a release
renames one, the new name is put in front of the old one, and nothing else changes.
"""

from __future__ import annotations

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

    def of(self, call: Call) -> T:
        """Value in `call`, of an argument that is not named in code."""
        return self.__get__(call, Call)

    def __str__(self) -> str:
        return told(self.names)


def told(names: tuple[str, ...]) -> str:
    """The name of an argument or field, and what it was before, for messages."""
    return " (before: ".join(names) + ")" * (len(names) - 1)


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
    pixels = Argument[Any]("pixel_values", "pixel_values_images", optional=True)
    videos = Argument[Tensor | None]("pixel_values_videos", optional=True)
    sizes = Argument[Any]("image_sizes", optional=True)
    pictures_of_prompts = Argument[Tensor | None]("batch_num_images", optional=True)
    aspect = Argument[str | None]("vision_aspect_ratio", optional=True)
    feature_layer = Argument[Any]("vision_feature_layer", optional=True)
    select = Argument[str | None]("vision_feature_select_strategy", optional=True)
    seams = Argument[Tensor]("cu_seqlens")
    pixel_mask = Argument[Tensor | None]("pixel_attention_mask", optional=True)
    image_grid = Argument[Tensor]("image_grid_thw")
    video_grid = Argument[Tensor | None]("video_grid_thw", optional=True)
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
