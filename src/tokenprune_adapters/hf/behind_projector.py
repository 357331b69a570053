"""Reduction behind the method that encodes pictures: what is dropped comes out of it as marks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tokenprune.errors import UnsupportedError
from tokenprune.hooks import NotCopyable, Removable
from tokenprune.kept_patches import Origin
from tokenprune.on_read import Maker
from tokenprune.plan import Plan
from tokenprune.report import Record
from tokenprune.signals import Signal, Signals
from tokenprune.strategy import Strategy
from tokenprune.to_device import sent
from tokenprune.tokens import VisualTokens

from ..kit.before_projector import Ids, Sizes
from ..kit.fingerprint import fingerprint
from .family import Encoded, Sight
from .outputs import Output, with_fields
from .picture_rows import PictureRow
from .slots import Slots
from .tower_attention import ReadTower


@dataclass(eq=False)
class BehindProjector(NotCopyable):
    """Reduction of features as they enter the language model.

    Attributes:
        strategy: for the tokens of each row; None keeps them all.
        record: where to note what was done.
        followed: whether stages follow inside the language model, which then count the tokens and
            ask what is known of them.
        reader: reads the tower's attention; or None.
    """

    strategy: Strategy | None
    record: Record
    followed: bool
    reader: ReadTower | None

    def install(self) -> Iterator[Removable]:
        """Yield the handles."""
        if self.reader is not None:
            yield from self.reader.install()

    def begin(self, sight: Sight, encoded: Encoded) -> None:
        """Pictures are going to be encoded."""
        if self.reader is not None:
            self.reader.begin(encoded.call)

    def over(self) -> None:
        """Nothing is being encoded any more."""

    def __call__(
        self, sight: Sight, encoded: Encoded, raw: Any, rows: Sequence[PictureRow]
    ) -> tuple[Any, Signals]:
        """The output with marks, and what is known of the tokens that are left."""
        flat, _, _ = flat_of(Output(raw).features)
        slots = Slots.of(rows, flat.device)
        seen = {} if self.reader is None else self.reader.take(encoded)
        signals = Signals({each: _by_row(each, slots.take(x)) for each, x in seen.items()})
        origins = [row.origin for row in rows]

        def ids() -> Tensor:
            return _prints(sight, encoded, origins).to(flat.device)

        return self.decide(sight, raw, slots, signals, ids, origins)

    def decide(
        self,
        sight: Sight,
        raw: Any,
        slots: Slots,
        signals: Signals,
        ids: Tensor | Maker,
        origins: Sequence[Origin | None],
    ) -> tuple[Any, Signals]:
        """The output with marks, and what is known of the tokens that are left.

        Args:
            sight: the kind of picture.
            raw: the output.
            slots: those of the rows.
            signals: of the rows.
            ids: `(rows,)` int64, which picture each shows, or what makes it.
            origins: what each row shows; None for a copy, which is not noted.
        """
        flat, back, _ = flat_of(Output(raw).features)
        tokens = VisualTokens.of(
            slots.take(flat), mask=slots.mask, lengths=slots.tokens, patches=slots.patches, ids=ids
        )
        if self.strategy is not None:
            with self.record.selecting(flat.device):
                reduction = self.strategy(tokens, signals)
            plan = reduction.plan
            self.record.decided(reduction, origins)
            if not self.followed:
                self.record.counted(tokens.lengths, {0: plan.lengths}, origins)
            if plan.members is not None or plan.lengths != slots.tokens:
                raw = Output(raw).replaced(features=back(slots.reduced(flat, plan, -torch.inf)))
                raw = _also_reduced(sight, raw, slots, plan)
                tokens, signals = reduction.tokens, signals.reduce(plan)
        known = {Ids(): tokens.ids, Sizes(): tokens.sizes} if self.followed else {}
        return raw, Signals({**signals, **known})


def _also_reduced(sight: Sight, raw: Any, slots: Slots, plan: Plan) -> Any:
    """`raw` with what goes the way of the features reduced alike."""
    for also in sight.also:
        name = also.name_in(raw)
        if name is None:
            raise also.missing_in(raw)
        made = []
        for layer in getattr(raw, name):
            rows, back, _ = flat_of(layer)
            made.append(back(slots.reduced(rows, plan, 0.0)))
        raw = with_fields(raw, {name: made})
    return raw


def flat_of(features: Any) -> tuple[Tensor, Callable[[Tensor], Any], Sequence[Tensor]]:
    """`(slots, channels)` of all elements, how to put them back, and the elements.

    Elements may have an axis of frames, or none where there is but one.
    """
    if isinstance(features, Tensor):
        shape = features.shape
        whole = features.flatten(0, -2)
        elements = [each.flatten(0, -2) for each in features] if features.ndim > 2 else [features]
        return whole, lambda x: x.reshape(shape), elements
    shapes, kind = [each.shape for each in features], type(features)
    elements = [each.flatten(0, -2) for each in features]

    def back(x: Tensor) -> Any:
        parts = torch.split(x, [len(each) for each in elements])
        return kind(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))

    return torch.cat(elements), back, elements


def features_of(raw: Any, rows: Sequence[PictureRow]) -> Sequence[Tensor]:
    """`(slots, channels)` of each row of an output, which stand one after the other."""
    flat, _, _ = flat_of(Output(raw).features)
    return torch.split(flat, [len(row.slots) for row in rows])


def _by_row(signal: Signal, x: Tensor) -> Tensor:
    """`(rows, tokens, ...)`, other axes in order, as `signal` has its axes."""
    others = [axis for axis in signal.axes.split() if axis not in ("batch", "tokens")]
    return rearrange(x, f"batch tokens {' '.join(others)} -> {signal.axes}")


def _prints(sight: Sight, encoded: Encoded, origins: Sequence[Origin]) -> Tensor:
    """`(rows,)` int64, which picture or frame each row shows."""
    pixels, pictures = sight.pixels_of(encoded), len({each.number for each in origins})
    if len(pixels) != pictures:
        raise UnsupportedError(
            f"{pictures} rows of {sight.encode} came from {len(pixels)} pictures; a family must "
            "say which pixels are of which row"
        )
    prints = fingerprint(pixels)
    number, crop = torch.tensor([(each.number, each.crop) for each in origins], device="cpu").T
    return prints[sent(number, prints.device)] + sent(crop * 0x9E3779B9, prints.device)
