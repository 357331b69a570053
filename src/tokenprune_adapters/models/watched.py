"""Rows of attention of the newest token of each prompt, read beside the model's own attention.

A hook after every decoder layer computes one row: of the prompt's last token while the prompt is
read, and later of the one token that came. The keys are those that the layer has just cached.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.adapter import Attended, NotCopyable, Removable
from tokenprune.errors import AttachError, UnsupportedError

from ..hf.anatomy import Anatomy
from ..hf.checks import check_llm
from ..hf.names import Output, calls_of
from ..llms.attention import check_layer, query_rows
from ..llms.cache import check_cache, state_of
from ..llms.images import Images, Seats
from ..llms.inside import RefuseCandidates
from .placed import FindImages


@dataclass(frozen=True, eq=False)
class _Prompts:
    """Where the pictures of a batch of prompts are.

    Attributes:
        batch: prompts.
        row: `(images,)` int64, the prompt that each image is in.
        column: `(images, tokens)` int64, the key that each visual token is, counted from the start.
    """

    batch: int
    row: Tensor
    column: Tensor


@dataclass(eq=False)
class _Pass:
    """A forward pass that is under way.

    Attributes:
        prompts: what it reads or continues.
        slots: columns of the pass.
        past: of the cache before it.
        query: `(batch, 1)` int64, the slot that asks.
        valid: `(batch, keys)` bool, False for padding; None where there is none.
        rows: `(images, heads, tokens)` of the layers that have run.
    """

    prompts: _Prompts
    slots: int
    past: int
    query: Tensor
    valid: Tensor | None
    rows: list[Tensor] = field(default_factory=list)


class WatchAttention(NotCopyable):
    """The hooks on a model and the decoder layers of its language model.

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
        for layer in parts.layers:
            check_layer(layer)

    def install(self) -> Iterator[Removable]:
        """Yield the handles."""
        core, model = self.parts.core, self.parts.model
        refuse = RefuseCandidates(model)
        yield model.register_forward_pre_hook(refuse.before, with_kwargs=True)
        yield core.register_forward_pre_hook(self._before, with_kwargs=True)
        for number, layer in enumerate(self.parts.layers):
            hook = _AfterLayer(self, layer, number)
            yield layer.register_forward_hook(hook.after, with_kwargs=True)
        yield core.register_forward_hook(self._after, always_call=True)

    @property
    def running(self) -> _Pass | None:
        """The pass of this thread that is to be read."""
        running: _Pass | None = getattr(self._local, "running", None)
        return running

    def _before(self, core: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._local.running = None
        call = self.calls(args, kwargs)
        images = self.find.find(call)
        ids, cache = call.ids, call.cache
        assert ids is not None
        past = 0 if cache is None else int(cache.get_seq_length())
        seats = None if images is None else images.seats()
        if seats is not None and seats.index.shape[1]:
            assert images is not None
            self._begin(images, seats, past)
        elif past == 0:
            self._local.prompts = None
            self.attended.forget()
        elif getattr(self._local, "prompts", None) is not None and ids.shape[1] > 1:
            raise UnsupportedError(
                f"a pass continues prompts by {ids.shape[1]} tokens, of which only the newest is "
                "watched; generate token by token, without candidates, and start a new cache for "
                "another turn"
            )
        prompts: _Prompts | None = getattr(self._local, "prompts", None)
        if prompts is None:
            return
        if ids.shape[0] != prompts.batch:
            raise UnsupportedError(
                f"a pass of {ids.shape[0]} rows continues {prompts.batch} prompts; generate "
                "without beams"
            )
        valid = _valid(call.mask, ids, past)
        numbers = torch.arange(ids.shape[1], device=ids.device)
        real = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid[:, past:]
        query = torch.where(real, numbers, -1).amax(1, keepdim=True).clamp(min=0)
        self._local.running = _Pass(prompts, ids.shape[1], past, query, valid)

    def _begin(self, images: Images, seats: Seats, past: int) -> None:
        place = images.place.flatten()[seats.index].masked_fill(~seats.mask, -1)
        self.attended.begin(place)
        self._local.prompts = _Prompts(seats.batch, seats.row, seats.column + past)

    def _after(self, core: nn.Module, args: object, output: object) -> None:
        running = self.running
        self._local.running = None
        if running is not None and output is not None:  # None after an exception
            if state_of(Output(output).cache) is not None:
                raise _shortened()
            device = self.attended.places.device
            self.attended.step(torch.stack([each.to(device) for each in running.rows], dim=1))


class _AfterLayer(NotCopyable):
    """The hook after one decoder layer."""

    def __init__(self, watch: WatchAttention, layer: nn.Module, number: int) -> None:
        self.watch = watch
        self.calls = calls_of(layer)
        self.number = number

    @torch.no_grad()
    def after(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
    ) -> None:
        running = self.watch.running
        if running is None:
            return
        call = self.calls(args, kwargs)
        hidden, cache = call.hidden, call.cache
        check_cache(cache)
        if hidden.shape[1] != running.slots:
            raise _shortened()
        keys = None if cache is None else cache.layers[self.number].keys
        if keys is None and running.past:
            raise UnsupportedError("a pass continues prompts, but its layers got no cache")
        rows = query_rows(layer, hidden, call.rotary, running.query, running.valid, keys)
        row, column = (
            each.to(rows.device) for each in (running.prompts.row, running.prompts.column)
        )
        asked = rows[:, :, 0][row]
        running.rows.append(asked.gather(2, column[:, None].expand(-1, asked.shape[1], -1)))


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
