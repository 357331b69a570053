"""Stages of a model by their placement, and the hooks on its language model that follow."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from tokenprune.errors import UnsupportedError
from tokenprune.hooks import NotCopyable, Removable
from tokenprune.placement import AfterLayer, BeforeLLM, Placement, Positions
from tokenprune.report import Record
from tokenprune.signals import LastQueryAttention, Signal, TextQueryAttention
from tokenprune.spec import shown
from tokenprune.strategy import Stage, Strategy

from .anatomy import Anatomy
from .candidates_guard import RefuseCandidates
from .core_hooks import SameParts, encode_untraced, hide_any_marks, hide_marks, keep_private
from .llm.image_slots import Images
from .llm.inner_stages import QueryAttention, ReduceInside
from .llm.layer_hooks import install_between
from .llm.run import IMAGES, TEXT, VISUAL
from .llm.short_prompt import ShortenPrompts
from .llm.signal_cache import SignalCache
from .names import Call, calls_of
from .outputs import Output


def check_placement(model: nn.Module, placement: Placement) -> None:
    """Refuse what is neither before the LLM nor after one of its layers."""
    if not isinstance(placement, (BeforeLLM, AfterLayer)):
        raise UnsupportedError(
            f"{type(model).__name__} does not offer {placement!r}; it offers 'before-llm' and "
            "'after-layer(2)' (any layer)"
        )


def readable(placement: Placement, of_tower: frozenset[type[Signal]]) -> frozenset[type[Signal]]:
    """What a stage can read: inside of the LLM its attention as well."""
    if isinstance(placement, AfterLayer):
        return of_tower | {LastQueryAttention, TextQueryAttention}
    return of_tower


@dataclass(frozen=True)
class Placed:
    """Stages of a model by their placement.

    Attributes:
        before: the stage before the LLM, or None.
        inside: stages by the decoder layer that they start at.
    """

    before: Stage | None
    inside: dict[int, Stage]

    @classmethod
    def of(cls, stages: tuple[Stage, ...], llm: Any) -> Placed:
        """Sort `stages`; two at one place are refused."""
        return cls(before_llm(stages), _inside_llm(stages, len(llm.layers)))

    @property
    def strategy(self) -> Strategy | None:
        """What is done before the LLM."""
        return None if self.before is None else self.before.strategy

    @property
    def of_tower(self) -> frozenset[Signal]:
        """What the stages ask of the vision tower."""
        stages = [*self.inside.values(), *([] if self.before is None else [self.before])]
        asked = {signal for stage in stages for signal in stage.strategy.signals}
        return frozenset(s for s in asked if not isinstance(s, QueryAttention))

    def install(
        self,
        parts: Anatomy,
        find: FindImages,
        store: SignalCache,
        record: Record,
        counting: Positions = "reindexed",
        planes: bool = False,
    ) -> Iterator[Removable]:
        """The hooks on the language model of a model, and what tells it of its images.

        Args:
            parts: the parts of the model.
            find: finds images in a call.
            store: where signals of the tower are found.
            record: where to note what was done.
            counting: position ids before the LLM, where the placement leaves them to the family.
            planes: whether they have a time, a row and a column (M-RoPE).
        """
        core, llm = parts.core, parts.llm
        yield core.register_forward_pre_hook(SameParts(core).before)
        yield from encode_untraced(parts)
        if self.before is not None:
            yield core.register_forward_hook(
                hide_any_marks if parts.projector is None else hide_marks
            )
        tell = _TellPass(parts, self.before is not None, find if self.inside else None)
        yield core.register_forward_pre_hook(tell.before, with_kwargs=True)
        yield from keep_private(parts)
        positions = counting
        if self.before is not None:
            assert isinstance(self.before.placement, BeforeLLM)
            positions = self.before.placement.positions or counting
        to_layers = bool(self.inside) or positions == "original"
        yield from ShortenPrompts(
            llm, positions, record, tuple(self.inside), to_layers, store.settle, planes
        ).install()
        if to_layers:
            hooks = ReduceInside(llm, self.inside, store, record)
            yield from install_between(hooks)
            if hooks.watched:
                hook = RefuseCandidates(parts.model)
                yield parts.model.register_forward_pre_hook(hook.before, with_kwargs=True)


class _TellPass(NotCopyable):
    """Hook before the core model that tells the language model what a pass brings.

    Args:
        parts: parts of the model.
        marks: whether features may be marked, of which a mask may hide some.
        find: finds the images, for stages inside the language model; or None.
    """

    def __init__(self, parts: Anatomy, marks: bool, find: FindImages | None) -> None:
        self.parts = parts
        self.calls = calls_of(parts.core)
        self.marks = marks
        self.find = find

    def before(
        self, core: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = self.calls(args, kwargs)
        ids = call.ids
        if ids is not None and call.pixels is None and call.videos is None and not call.encoded:
            kwargs[TEXT] = True
            return args, kwargs
        if self.marks and ids is not None and call.mask is not None and ids.shape[1] > 1:
            videos = self.parts.placeholders(ids, "video")
            call.kwargs[VISUAL] = self.parts.placeholders(ids, "image") | videos
        if self.find is not None:
            self.find.encode(call)
            call.kwargs[IMAGES] = partial(self.find.find, call)
        return call.hooked


class FindImages(NotCopyable):
    """Tells the language model which slots of a prompt hold image features.

    Args:
        core: the model without its head.
        images: function that makes `Images` from the token ids and a call with images.
        encoded: function that encodes the pictures of a call before the model does; None where
            `images` needs no features.
    """

    def __init__(
        self,
        core: nn.Module,
        images: Callable[[Tensor, Call], Images],
        encoded: Callable[[Call], None] | None = None,
    ) -> None:
        self.calls = calls_of(core)
        self.images = images
        self.encoded = encoded

    def encode(self, call: Call) -> None:
        """Encode the pictures of a call now, where they are found by their features."""
        if self.encoded is not None and call.ids is not None:
            self.encoded(call)

    def find(self, call: Call) -> Images | None:
        """The images of a call of the model without its head; None where it brings none."""
        ids = call.ids
        if ids is None:
            raise UnsupportedError(
                "reduction after a layer finds visual tokens by their placeholders in input_ids; "
                "pass input_ids instead of inputs_embeds"
            )
        encoded = call.encoded or {}
        # A chunk of a prompt comes with nothing but the features that it holds.
        if any(Output(each).last is None for each in encoded.values()):
            raise UnsupportedError(
                "a stage after a layer needs to see the prompt as a whole; chunked prefill cannot "
                "be combined with it, drop prefill_chunk_size"
            )
        pixels = [given for given in (call.pixels, call.videos) if given is not None]
        return self.images(ids, call) if encoded or any(map(len, pixels)) else None


def before_llm(stages: tuple[Stage, ...]) -> Stage | None:
    """The stage before the LLM, of which there can be one."""
    found = [stage for stage in stages if isinstance(stage.placement, BeforeLLM)]
    if len(found) > 1:
        raise UnsupportedError(
            f"{len(found)} stages before the LLM; join them into one: "
            + " | ".join(shown(stage.strategy) for stage in found)
        )
    return found[0] if found else None


def _inside_llm(stages: tuple[Stage, ...], layers: int) -> dict[int, Stage]:
    """Stages by the layer that they start at; one after the last layer does nothing but warn."""
    found: dict[int, Stage] = {}
    for stage in stages:
        if not isinstance(stage.placement, AfterLayer):
            continue
        start = stage.placement.layers
        if start in found:
            raise UnsupportedError(
                f"two stages at after-layer({start}); join them into one: "
                f"{shown(found[start].strategy)} | {shown(stage.strategy)}"
            )
        if start >= layers:
            warnings.warn(
                f"{shown(stage)!r} reduces nothing: the LLM has {layers} layers",
                stacklevel=2,
            )
        found[start] = stage
    return {start: found[start] for start in sorted(found) if start < layers}
