"""Methods that encode pictures, of a family: what is dropped comes out of them as marks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.budget import Per
from tokenprune.errors import UnsupportedError
from tokenprune.hooks import NotCopyable, Removable
from tokenprune.placement import Newline
from tokenprune.report import Record
from tokenprune.signals import Signals
from tokenprune.to_device import sent

from ..kit.method_wrapper import wrap_method
from .anatomy import Anatomy
from .before_projector import BeforeProjector
from .behind_projector import BehindProjector, features_of, flat_of
from .call_images import NOTED
from .family import Encoded, Sight
from .llm.signal_cache import Held, SignalCache
from .names import Call, Signature
from .outputs import Output
from .picture_rows import PictureRow, divides, rows_of
from .tiles import Tiles


@dataclass(eq=False)
class Encoders(NotCopyable):
    """What is around the methods of one model that encode pictures.

    Attributes:
        parts: the parts of the model.
        sights: the kinds of picture that it takes.
        reduce: reduces what is encoded.
        record: where to note what was done.
        later: where stages inside the language model find what is known of rows; or None.
        per: what budgets are for.
        newline: what becomes of newline tokens.
        tiles: where tiles wait for the prompts that tell their pictures; None where a row is what
            has a budget.
    """

    parts: Anatomy
    sights: tuple[Sight, ...]
    reduce: BeforeProjector | BehindProjector
    record: Record
    later: SignalCache | None
    per: Per = "image"
    newline: Newline = "keep"
    tiles: Tiles | None = None
    _local: threading.local = field(default_factory=threading.local)

    def install(self) -> Iterator[Removable]:
        """Yield the handles."""
        for sight in self.sights:
            around = _Around(self, sight, Signature.of(getattr(self.parts.core, sight.encode)))
            yield from wrap_method(self.parts.core, sight.encode, around)
        yield self.parts.core.register_forward_pre_hook(self._begin, with_kwargs=True)
        yield self.parts.core.register_forward_hook(self._over, always_call=True)
        yield from self.reduce.install()

    def _begin(self, core: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        self._over(core)
        for sight in self.sights:
            for name in sight.pixels.names:
                _refuse_lists(f"{type(core).__name__}.forward", name, kwargs.get(name))

    def _over(self, core: nn.Module, *rest: object) -> None:
        """What is encoded next is of other prompts."""
        self._local.kinds = frozenset()

    def encode(self, sight: Sight, made: Call, call: Callable[[], Any]) -> Any:
        """Make a call, and reduce what it gives."""
        # A method for videos may call that for images: the outermost call decides.
        if getattr(self._local, "running", False):
            return call()
        _refuse_missing(sight, made)
        # Pictures and videos of the same prompts come in a call each.
        kinds: frozenset[str] = getattr(self._local, "kinds", frozenset())
        joins = bool(kinds) and sight.kind not in kinds
        self._local.running = True
        try:
            with self.record.same_call() if joins else nullcontext():
                begun = Encoded(self.parts.core, made, (), self.per)
                self.reduce.begin(sight, begun)
                output = call()
                # A tuple is of a caller's own; the model never takes one back.
                if not isinstance(output, tuple):
                    output = self._reduced(sight, begun, output)
        finally:
            self._local.running = False
            self.reduce.over()
        self._local.kinds = kinds | {sight.kind} if joins else frozenset({sight.kind})
        return output

    def _reduced(self, sight: Sight, begun: Encoded, raw: Any) -> Any:
        flat, _, elements = flat_of(Output(raw).features)
        encoded = replace(begun, elements=elements)  # with what was made of it before
        patches = sight.told(encoded)
        assert patches is not None  # by what `_refuse_missing` looks for
        if sum(map(len, patches)) != len(flat):
            raise UnsupportedError(
                f"{sight.encode} of {type(self.parts.core).__name__} gave {len(flat)} features "
                f"where its rows have {sum(map(len, patches))} slots"
            )
        crops = None if sight.crops is None else sight.crops(encoded)
        rows = rows_of(sight, encoded, patches, crops)
        if self.tiles is not None:
            self.tiles.note(sight, encoded, raw, rows)
            return raw
        raw, known = self.reduce(sight, encoded, raw, rows)
        if self.newline == "drop" and sight.newlines:
            raw = _without_newlines(raw, patches)
        if self.later is not None:
            self._put(sight, raw, rows, known, patches, crops)
            # `generate` hands this to `forward` in place of the pixels.
            setattr(raw, NOTED, crops)
        return raw

    def _put(
        self,
        sight: Sight,
        raw: Any,
        rows: Sequence[PictureRow],
        known: Signals,
        patches: Sequence[Tensor],
        crops: Sequence[int] | None,
    ) -> None:
        """Leave what is known of rows, and of the whole of which they are parts, for `find`."""
        assert self.later is not None
        counts = [1] * len(patches) if crops is None else crops
        held = list(map(Held, patches, counts))
        wholes: list[tuple[Tensor, Held]] = []
        if divides(sight, self.per):
            flat, _, _ = flat_of(Output(raw).features)
            whole = torch.split(flat, list(map(len, patches)))
            # One that is not divided is among the rows.
            wholes = [each for each in zip(whole, held, strict=True) if each[1].crops > 1]
            held = [Held(row.patches, 1) for row in rows]
        self.later.put(features_of(raw, rows), known, held, wholes)


@dataclass(frozen=True, eq=False)
class _Around:
    """What is put around one method."""

    encoders: Encoders
    sight: Sight
    signature: Signature

    def __call__(self, call: Callable[[], Any], given: Mapping[str, Any]) -> Any:
        return self.encoders.encode(self.sight, Call(self.signature, (), dict(given)), call)


def _refuse_missing(sight: Sight, call: Call) -> None:
    missing = [str(each) for each in sight.needs if each.of(call) is None]
    if missing:
        raise UnsupportedError(
            f"{call.what} was called without {', '.join(missing)}, so it is not known which slots "
            "are which patches; pass all that the model's processor gives"
        )
    _refuse_lists(call.what, sight.pixels.names[0], sight.pixels.of(call))


def _refuse_lists(what: str, name: str, pixels: Any) -> None:
    if isinstance(pixels, (list, tuple)):
        raise UnsupportedError(
            f"{what} was called with a {type(pixels).__name__} of {len(pixels)} for "
            f"{name}; pass one tensor, padded as the model's processor pads"
        )


def _without_newlines(raw: Any, patches: Sequence[Tensor]) -> Any:
    """The output with marks in place of newline tokens."""
    flat, back, _ = flat_of(Output(raw).features)
    newline = sent(torch.cat(list(patches)) < 0, flat.device)
    return Output(raw).replaced(features=back(flat.masked_fill(newline[:, None], -torch.inf)))
