"""Methods that encode pictures, of a family: what is dropped comes out of them as marks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenprune.budget import Per
from tokenprune.errors import UnsupportedError
from tokenprune.hooks import NotCopyable, Removable
from tokenprune.kept_patches import Kind, Origin
from tokenprune.plan import Plan
from tokenprune.report import Record
from tokenprune.signals import Signal, Signals
from tokenprune.strategy import Reduction, Strategy
from tokenprune.to_device import sent
from tokenprune.tokens import VisualTokens

from ..kit.before_projector import Ids, Sizes
from ..kit.fingerprint import fingerprint
from ..kit.method_wrapper import wrap_method
from .anatomy import Anatomy
from .family import Encoded, Sight
from .llm.image_slots import Images
from .llm.signal_cache import SignalCache
from .names import Call, Signature
from .outputs import Output, with_fields
from .slots import Slots
from .tower_attention import ReadTower


@dataclass(eq=False)
class Encoders(NotCopyable):
    """What is around the methods of one model that encode pictures.

    Attributes:
        parts: the parts of the model.
        sights: the kinds of picture that it takes.
        strategy: for the tokens of each row; None keeps them all.
        record: where to note what was done.
        later: where stages inside the language model find what is known of rows; or None.
        reader: reads the tower's attention; or None.
        per: what budgets are for; ``"frame"`` takes rows of videos apart.
    """

    parts: Anatomy
    sights: tuple[Sight, ...]
    strategy: Strategy | None
    record: Record
    later: SignalCache | None
    reader: ReadTower | None
    per: Per = "image"
    _local: threading.local = field(default_factory=threading.local)

    def install(self) -> Iterator[Removable]:
        """Yield the handles."""
        for sight in self.sights:
            around = _Around(self, sight, Signature.of(getattr(self.parts.core, sight.encode)))
            yield from wrap_method(self.parts.core, sight.encode, around)
        yield self.parts.core.register_forward_pre_hook(self._over)
        yield self.parts.core.register_forward_hook(self._over, always_call=True)

    def _over(self, core: nn.Module, *rest: object) -> None:
        """What is encoded next is of other prompts."""
        self._local.kinds = frozenset()

    def encode(self, sight: Sight, made: Call, call: Callable[[], Any]) -> Any:
        """Make a call, and reduce what it gives."""
        # A method for videos may call that for images: the outermost call decides.
        if getattr(self._local, "running", False):
            return call()
        self._local.running = True
        if self.reader is not None:
            self.reader.begin(made)
        try:
            output = call()
        finally:
            self._local.running = False
        if isinstance(output, tuple):  # of a caller's own; the model never takes one back
            return output
        return self._reduced(sight, made, output)

    def _reduced(self, sight: Sight, call: Call, raw: Any) -> Any:
        flat, back, elements = _flat(Output(raw).features)
        encoded = Encoded(self.parts.core, call, elements)
        patches = sight.patches_of(encoded)
        origins = sight.origins_of(encoded, patches)
        if self.per == "frame" and sight.frames is not None:
            patches, origins = _by_frame(patches, origins)
        slots = Slots.of(patches, flat.device)
        if sum(slots.lengths) != len(flat):
            raise UnsupportedError(
                f"{sight.encode} of {type(self.parts.core).__name__} gave {len(flat)} features "
                f"where its rows have {sum(slots.lengths)} slots"
            )
        seen = {} if self.reader is None else self.reader.take(encoded)
        signals = Signals({each: _by_row(each, slots.take(x)) for each, x in seen.items()})
        tokens = VisualTokens.of(
            slots.take(flat),
            mask=slots.mask,
            lengths=slots.tokens,
            patches=slots.patches[slots.index].masked_fill(~slots.mask, 0),
            ids=lambda: _prints(sight, encoded, origins).to(flat.device),
        )
        if self.strategy is not None:
            reduction = self._decide(sight.kind, tokens, signals, origins)
            plan = reduction.plan
            if plan.members is not None or plan.lengths != slots.tokens:
                flat = slots.reduced(flat, plan, -torch.inf)
                raw = Output(raw).replaced(features=back(flat))
                raw = _also_reduced(sight, raw, slots, plan)
                tokens, signals = reduction.tokens, signals.reduce(plan)
        if self.later is not None:
            known: dict[Signal, Tensor] = {**signals, Ids(): tokens.ids, Sizes(): tokens.sizes}
            self.later.put(torch.split(flat, slots.lengths), Signals(known), patches)
        return raw

    def _decide(
        self, kind: Kind, tokens: VisualTokens, signals: Signals, origins: Sequence[Origin]
    ) -> Reduction:
        """Run the strategy, and note what it did."""
        assert self.strategy is not None
        with self.record.selecting(tokens.features.device):
            reduction = self.strategy(tokens, signals)
        # Pictures and videos of the same prompts come in a call each.
        kinds: frozenset[str] = getattr(self._local, "kinds", frozenset())
        joins = bool(kinds) and kind not in kinds
        self._local.kinds = kinds | {kind} if joins else frozenset({kind})
        with self.record.same_call() if joins else nullcontext():
            self.record.decided(reduction, origins)
            if self.later is None:
                self.record.counted(tokens.lengths, {0: reduction.plan.lengths}, origins)
        return reduction

    def encode_now(self, call: Call) -> None:
        """Encode what the model would encode in a call of it, a moment earlier.

        So stages inside the language model see the features, as they do where `generate` has
        encoded them.
        """
        if call.encoded:
            return
        encoded: dict[str, Any] = {}
        for sight in self.sights:
            if sight.pixels.of(call) is not None:
                method = getattr(self.parts.core, sight.encode)
                taken = Signature.of(method).names & call.kwargs.keys()
                encoded[sight.kind] = method(
                    **{name: call.kwargs[name] for name in taken}, return_dict=True
                )
                sight.pixels.__set__(call, None)
        if encoded:
            call.encoded = encoded

    def find(self, ids: Tensor, call: Call) -> Images:
        """The images and videos of a call of the model."""
        assert self.later is not None
        found: Images | None = None
        for sight in self.sights:
            output = (call.encoded or {}).get(sight.kind)
            if output is None:
                continue
            flat, _, elements = _flat(Output(output).features)
            given = Encoded(self.parts.core, call, elements)
            patches = self.later.patches(torch.split(flat, sight.lengths_of(given)))
            origins = sight.origins_of(given, patches)
            here = Images.of(self.parts.placeholders(ids, sight.kind), patches, origins)
            found = here if found is None else found.joined_with(here)
        assert found is not None
        return found


@dataclass(frozen=True, eq=False)
class _Around:
    """What is put around one method."""

    encoders: Encoders
    sight: Sight
    signature: Signature

    def __call__(self, call: Callable[[], Any], given: Mapping[str, Any]) -> Any:
        return self.encoders.encode(self.sight, Call(self.signature, (), dict(given)), call)


def _also_reduced(sight: Sight, raw: Any, slots: Slots, plan: Plan) -> Any:
    """`raw` with what goes the way of the features reduced alike."""
    for also in sight.also:
        name = also.name_in(raw)
        if name is None:
            raise also.missing_in(raw)
        made = []
        for layer in getattr(raw, name):
            rows, back, _ = _flat(layer)
            made.append(back(slots.reduced(rows, plan, 0.0)))
        raw = with_fields(raw, {name: made})
    return raw


def _flat(features: Any) -> tuple[Tensor, Callable[[Tensor], Any], Sequence[Tensor]]:
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
    number, frame = torch.tensor([(each.number, each.crop) for each in origins], device="cpu").T
    return prints[sent(number, prints.device)] + sent(frame * 0x9E3779B9, prints.device)


def _by_frame(
    patches: Sequence[Tensor], origins: Sequence[Origin]
) -> tuple[list[Tensor], list[Origin]]:
    """Rows of frames: the slots of each, patches counted over the frame, and what it shows.

    Slots without a patch stay with the frame before them.
    """
    found: list[Tensor] = []
    shown: list[Origin] = []
    for patch, origin in zip(patches, origins, strict=True):
        size = origin.patches_per_crop
        if size is None:
            raise UnsupportedError(
                "per='frame' needs the pixels of a video: it is not known how many frames its "
                "features have"
            )
        frame = torch.where(patch >= 0, patch // size, -1).cummax(0).values.clamp(min=0)
        for number in range(int(frame.max()) + 1):
            mine = patch[frame == number]
            found.append(torch.where(mine >= 0, mine % size, -1))
            shown.append(Origin(origin.number, origin.kind, crop=number))
    return found, shown
