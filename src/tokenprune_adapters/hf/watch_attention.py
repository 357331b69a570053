"""Attention rows of the newest token of each prompt, read beside the model's own attention.

In every decoder layer one row is read: of the prompt's last token while the prompt is read, and
later of the one token that came.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import AttachError, UnsupportedError
from tokenprune.hooks import NotCopyable, Removable
from tokenprune.observation import Attended

from .anatomy import Anatomy
from .attention import Asked, ReadAttention
from .candidates_guard import RefuseCandidates
from .checks import check_llm
from .llm.image_slots import Images, Seats
from .llm.kv_cache import Room, check_cache, state_of
from .llm.padding import are_seams, steps_of
from .llm.text_attention import Prompts, last_rows
from .names import calls_of
from .outputs import Output
from .stage_hooks import FindImages


@dataclass(frozen=True, eq=False)
class _Pictures:
    """Pictures of a batch of prompts, and their slots.

    Attributes:
        batch: number of prompts.
        row: `(images,)` int64, the prompt that each image is in.
        column: `(images, tokens)` int64, the key that each visual token is, counted from the start.
    """

    batch: int
    row: Tensor
    column: Tensor


@dataclass(eq=False)
class _Pass:
    """Forward pass that is under way.

    Attributes:
        pictures: those of the prompts that it reads or continues.
        prompts: the slots of the pass.
        rows: `(images, heads, tokens)` of the layers that have run.
    """

    pictures: _Pictures
    prompts: Prompts
    rows: list[Tensor] = field(default_factory=list)


class WatchAttention(NotCopyable):
    """Hooks on a model and the decoder layers of its language model.

    Args:
        parts: the parts of the model.
        find: tells which slots of a prompt are visual.
        attended: where to note what was attended to.
    """

    def __init__(self, parts: Anatomy, find: FindImages, attended: Attended) -> None:
        self.parts = parts
        self.calls = calls_of(parts.core)
        self.find = find
        self.attended = attended
        self._local = threading.local()
        check_llm(parts.llm)
        self.reading = [ReadAttention(layer) for layer in parts.layers]

    def install(self) -> Iterator[Removable]:
        """Yield the handles."""
        core, model = self.parts.core, self.parts.model
        refuse = RefuseCandidates(model)
        yield model.register_forward_pre_hook(refuse.before, with_kwargs=True)
        yield core.register_forward_pre_hook(self._before, with_kwargs=True)
        for number, layer in enumerate(self.parts.layers):
            hook = _BeforeLayer(self, layer, number)
            yield layer.register_forward_pre_hook(hook.before, with_kwargs=True)
            yield from self.reading[number].install()
        yield core.register_forward_hook(self._after, always_call=True)

    @property
    def running(self) -> _Pass | None:
        """The pass of this thread that is to be read."""
        running: _Pass | None = getattr(self._local, "running", None)
        return running

    def _before(self, core: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._local.running = None
        call = self.calls(args, kwargs)
        self.find.encode(call)
        images = self.find.find(call)
        ids, cache = call.ids, call.cache
        check_cache(cache)
        if Room.of(cache, 0) is not None:
            raise UnsupportedError(
                "static caches have no length that is told step by step; use a DynamicCache "
                "(cache_implementation='dynamic', the default) to watch what is attended to"
            )
        assert ids is not None
        past = 0 if cache is None else int(cache.get_seq_length())
        seats = None if images is None else images.asked().seats()
        if seats is not None and seats.index.shape[1]:
            assert images is not None
            self._begin(images, seats, past)
        elif past == 0:
            self._local.pictures = None
            self.attended.forget()
        elif getattr(self._local, "pictures", None) is not None and ids.shape[1] > 1:
            raise UnsupportedError(
                f"a pass continues prompts by {ids.shape[1]} tokens, of which only the newest is "
                "watched; generate token by token, without candidates, and start a new cache for "
                "another turn"
            )
        pictures: _Pictures | None = getattr(self._local, "pictures", None)
        if pictures is None:
            return
        if ids.shape[0] != pictures.batch:
            raise UnsupportedError(
                f"a pass of {ids.shape[0]} rows continues {pictures.batch} prompts; generate "
                "without beams"
            )
        valid = _valid(call.mask, ids, past)
        real = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid[:, past:]
        steps = steps_of(self.parts.llm, call, ids.shape)
        if steps is not None and not are_seams(self.parts.llm, call, bool(real.all())):
            steps = None
        prompts = Prompts(real, valid, steps)
        self._local.running = _Pass(pictures, prompts)

    def _begin(self, images: Images, seats: Seats, past: int) -> None:
        patches = images.patch.flatten()[seats.index].masked_fill(~seats.mask, -1)
        self.attended.begin(patches)
        self._local.pictures = _Pictures(seats.batch, seats.row, seats.column + past)

    def _after(self, core: nn.Module, args: object, output: object) -> None:
        running = self.running
        self._local.running = None
        if running is not None and output is not None:  # None after an exception
            if state_of(Output(output).cache) is not None:
                raise _shortened()
            if len(running.rows) != len(self.parts.layers):
                raise _unread(self.parts.layers[0])
            device = self.attended.patches.device
            self.attended.step(torch.stack([each.to(device) for each in running.rows], dim=1))


class _BeforeLayer(NotCopyable):
    """Hook before one decoder layer, which asks its attention for queries and keys."""

    def __init__(self, watch: WatchAttention, layer: nn.Module, number: int) -> None:
        self.watch = watch
        self.calls = calls_of(layer)
        self.number = number

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.watch.reading[self.number].ask(None)
        running = self.watch.running
        if running is None:
            return
        call = self.calls(args, kwargs)
        pictures, prompts = running.pictures, running.prompts
        if call.hidden.shape[1] != prompts.real.shape[1]:
            raise _shortened()
        if len(running.rows) != self.number:
            raise _unread(layer)

        def read(asked: Asked) -> None:
            # Hooks that were installed later have shortened what this layer computes.
            if asked.query.shape[2] != prompts.real.shape[1]:
                raise _shortened()
            device = asked.key.device
            row, column = pictures.row.to(device), pictures.column.to(device)
            first = asked.key.shape[2] - prompts.real.shape[1]
            running.rows.append(last_rows(asked, prompts.to(device), row, column - first))

        self.watch.reading[self.number].ask(read)


def _unread(layer: nn.Module) -> UnsupportedError:
    return UnsupportedError(
        f"attention rows of {type(layer).__name__} cannot be read: its attention has not called "
        "its attention function"
    )


def _shortened() -> AttachError:
    return AttachError(
        "visual tokens were taken from this prompt; what tokens attend to is watched in the "
        "unpruned model alone: detach first, or attach with a budget of 1.0"
    )


def _valid(mask: Any, ids: Tensor, past: int) -> Tensor | None:
    """`(batch, keys)` bool, False for padding; None where nothing says so."""
    if mask is None:
        return None
    expected = (ids.shape[0], past + ids.shape[1])
    if not isinstance(mask, Tensor) or tuple(mask.shape) != expected:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedError(
            f"attention_mask must have axes (batch tokens) = {expected} to watch what is attended "
            f"to, got {got}; static caches and custom 4-D masks are not supported"
        )
    return mask.to(device=ids.device, dtype=torch.bool)
