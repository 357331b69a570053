"""Cache of tower signals per image, keyed by a fingerprint of its features.

Stages inside the language model ask for signals of the tower. On the way, `generate` repeats,
regroups and slices the images of a batch, so they are found again by what they look like.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tokenprune.errors import MissingSignalError
from tokenprune.hooks import NotCopyable
from tokenprune.kept_patches import Origin
from tokenprune.signals import Signal, Signals
from tokenprune.untraced import untraced

from .copies import without_copies
from .image_slots import Images, feature_prints


@dataclass(frozen=True, eq=False)
class Held:
    """What the slots of an image hold.

    Attributes:
        patches: `(slots,)` int64 on the CPU, see `Images.of`.
        crops: number of crops or frames, whose patches are counted one after the other.
    """

    patches: Tensor
    crops: int


@dataclass(frozen=True, eq=False)
class _Image:
    """Signals that are known of one image.

    Attributes:
        signals: signals of the patches that are left, without an axis of images.
        held: what its slots hold; None: patches in order.
        times: how often it was among the images that it came with.
    """

    signals: dict[Signal, Tensor]
    held: Held | None
    times: int


@dataclass(eq=False)
class _Remembered:
    """Images that one thread has put, oldest first, and how many came with the latest call."""

    images: OrderedDict[int, _Image] = field(default_factory=OrderedDict)
    latest: int = 0


class SignalCache(NotCopyable):
    """Signals of the latest images, by fingerprint; safe to share between threads.

    No thread makes another one's images forgotten. Of each thread, those of the latest two calls of
    `put` stay whatever their number, since models may encode the pictures and the videos of one
    batch in a call each.

    Args:
        dtype: function that gives the dtype of the language model's embeddings, into which features
            are cast; a model may change it while it is attached.
        capacity: images remembered of each thread, if two calls don't bring more.
    """

    def __init__(self, dtype: Callable[[], torch.dtype], capacity: int = 64) -> None:
        self.dtype = dtype
        self.capacity = capacity
        self._of: WeakKeyDictionary[threading.Thread, _Remembered] = WeakKeyDictionary()
        self._lock = threading.Lock()
        self._pending: list[tuple[threading.Thread, Tensor, list[_Image]]] = []

    @untraced
    def put(
        self,
        features: Tensor | Sequence[Tensor],
        signals: Signals,
        held: Sequence[Held] = (),
        wholes: Sequence[tuple[Tensor, Held]] = (),
    ) -> None:
        """Remember what is known of some images.

        Args:
            features: projected, `(images, slots, channels)` or `(slots, channels)` of each.
            signals: signals of the patches that are left.
            held: what the slots of each image hold, where that differs.
            wholes: features of videos of which these images are frames, with what they hold.
        """
        prints = self._prints([*(each for each, _ in wholes), *features] if wholes else features)
        known = [_Image({}, each, 1) for _, each in wholes]
        known += [
            _Image(
                {s: answer[number] for s, answer in signals.items()},
                held[number] if held else None,
                1,
            )
            for number in range(len(prints) - len(wholes))
        ]
        with self._lock:
            self._pending.append((threading.current_thread(), prints, known))
            waiting = len(self._pending)
        if waiting > 2:  # nobody has asked since: what is older is put away, and may be forgotten
            self.settle(prints[:0])

    def settle(self, numbers: Tensor) -> list[int]:
        """`(n,)` int64 `numbers` as a list, by a host sync that fingerprints share."""
        with self._lock:
            pending, self._pending = self._pending, []
            every = [*(prints.to(numbers.device) for _, prints, _ in pending), numbers]
            told: list[int] = torch.cat(every).tolist()
            for thread, _, known in pending:
                prints, told = told[: len(known)], told[len(known) :]
                self._remember(self._of.setdefault(thread, _Remembered()), prints, known)
        return told

    def _remember(self, mine: _Remembered, prints: list[int], known: list[_Image]) -> None:
        times = Counter(prints)
        for each, image in zip(prints, known, strict=True):
            mine.images.pop(each, None)
            mine.images[each] = replace(image, times=times[each])
        while len(mine.images) > max(self.capacity, mine.latest + len(prints)):
            mine.images.popitem(last=False)
        mine.latest = len(prints)

    def _look_up(self, prints: list[int]) -> list[_Image | None]:
        """The images with these fingerprints; None for one that did not come by here."""
        if self._pending:
            self.settle(self._pending[0][1][:0])
        with self._lock:
            # Features may be encoded in one thread and used in another.
            mine = self._of.get(threading.current_thread(), _Remembered())
            everywhere = [mine, *self._of.values()]
            return [
                next((one.images[each] for one in everywhere if each in one.images), None)
                for each in prints
            ]

    def _find(self, prints: list[int]) -> list[_Image]:
        """The images with these fingerprints; none if one of them did not come by here."""
        found = self._look_up(prints)
        known = [each for each in found if each is not None]
        return known if len(known) == len(found) else []

    def originals(
        self, images: Images, prints: list[int], rows: list[int]
    ) -> tuple[Origin | None, ...]:
        """What each of `images` is; None for a copy of one that was encoded less often.

        Between encoding and a forward pass, `generate` repeats prompts for beams and for
        `num_return_sequences`. A picture that was given twice was also encoded twice.

        Args:
            images: the images of a batch of prompts.
            prints: their fingerprints.
            rows: the prompt that each is in.
        """
        batch = images.image.shape[0]
        return without_copies(images.origins, prints, rows, batch, self.times(prints))

    def times(self, prints: list[int]) -> dict[int, int]:
        """How often each of these images was encoded; those that came by here."""
        found = zip(prints, self._look_up(prints), strict=True)
        return {each: image.times for each, image in found if image is not None}

    def held(self, features: Sequence[Tensor]) -> list[Held] | None:
        """What the slots of images with these features hold; None if one did not come by here."""
        found = self._find(self.numbers(features))
        held = [each.held for each in found if each.held is not None]
        return held if len(held) == len(features) else None

    def numbers(self, features: Sequence[Tensor]) -> list[int]:
        """Fingerprints of images with these features. One sync."""
        return self._prints(features).tolist()

    def _prints(self, features: Tensor | Sequence[Tensor]) -> Tensor:
        """`(images,)` int64, one number per image, as `Images.printed` finds them."""
        if isinstance(features, Tensor):
            return feature_prints(features.to(self.dtype()))
        return feature_prints([each.to(self.dtype()) for each in features])

    def get(self, prints: list[int], device: torch.device) -> Signals:
        """What is known of all these images; nothing if one of them did not come by here.

        Args:
            prints: fingerprints of their features.
            device: where the answers are wanted.
        """
        known = [each.signals for each in self._find(prints)]
        if not known:
            return Signals()
        return Signals(
            {
                signal: _stack([each[signal] for each in known], signal.axes).to(device)
                for signal in known[0]
                if all(signal in each for each in known)
            }
        )


def refuse_unknown(wanted: Iterable[Signal], known: Mapping[Signal, Tensor]) -> None:
    """Refuse signals of features that no attached tower has made."""
    missing = [signal for signal in wanted if signal not in known]
    if missing:
        raise MissingSignalError(
            f"{', '.join(map(repr, missing))} of an image is not known: its features did not "
            "come from the attached vision tower; pass pixel_values, not features of your own"
        )


def _stack(answers: list[Tensor], axes: str) -> Tensor:
    """One tensor of the images' answers, their axes of tokens padded by zeros."""
    names = axes.split()[1:]
    if "tokens" in names:
        axis = names.index("tokens")
        most = max(answer.shape[axis] for answer in answers)
        answers = [_padded(answer, axis, most) for answer in answers]
    return torch.stack(answers)


def _padded(answer: Tensor, axis: int, tokens: int) -> Tensor:
    shape = list(answer.shape)
    shape[axis] = tokens - shape[axis]
    return torch.cat([answer, answer.new_zeros(shape)], dim=axis)


def fitted(signals: Signals, tokens: int) -> Signals:
    """`signals` with an axis of `tokens`: what is cut off is padding in every image."""
    return Signals({**signals, **signals.along_tokens(lambda x: x.narrow(1, 0, tokens))})
