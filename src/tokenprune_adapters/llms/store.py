"""Signals of the vision tower, kept until a stage inside the language model reads them.

Between the two, `generate` repeats, regroups and slices the images of a batch. They are found again
by what they look like: a fingerprint of their projected features.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import torch
from torch import Tensor

from tokenprune.adapter import NotCopyable
from tokenprune.errors import MissingSignalError
from tokenprune.signals import Signal, Signals

from .images import feature_prints


class SignalStore(NotCopyable):
    """Signals of the latest images, by fingerprint; safe to share between threads.

    Args:
        dtype: of the language model's embeddings, into which features are cast.
        capacity: images remembered; a larger batch is remembered whole.
    """

    def __init__(self, dtype: torch.dtype, capacity: int = 64) -> None:
        self.dtype = dtype
        self.capacity = capacity
        self._known: OrderedDict[int, dict[Signal, Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, features: Tensor, signals: Signals) -> None:
        """Remember the signals of images with projected `(images, tokens, channels)` features."""
        prints = feature_prints(features.to(self.dtype)).tolist()
        with self._lock:
            for number, each in enumerate(prints):
                self._known.pop(each, None)
                self._known[each] = {s: answer[number] for s, answer in signals.items()}
            while len(self._known) > max(self.capacity, len(prints)):
                self._known.popitem(last=False)

    def get(self, prints: Tensor, signals: frozenset[Signal], tokens: int) -> dict[Signal, Tensor]:
        """The answers to `signals` of these images, padded to `tokens`.

        Raises:
            MissingSignalError: an image's features did not come from the attached tower.
        """
        with self._lock:
            found = [self._known.get(each) for each in prints.tolist()]
        if signals and not all(found):
            raise MissingSignalError(
                f"{', '.join(map(repr, signals))} of an image is not known: its features did not "
                "come from the attached vision tower; pass pixel_values, not features of your own"
            )
        return {
            signal: torch.stack(
                [_pad(known[signal], signal.axes, tokens) for known in found if known]
            ).to(prints.device)
            for signal in signals
        }


def _pad(answer: Tensor, axes: str, tokens: int) -> Tensor:
    """One image's answer with its axis of tokens padded by zeros."""
    names = axes.split()[1:]
    if "tokens" not in names:
        return answer
    axis = names.index("tokens")
    shape = list(answer.shape)
    shape[axis] = tokens - shape[axis]
    if shape[axis] <= 0:
        return answer.narrow(axis, 0, tokens)
    return torch.cat([answer, answer.new_zeros(shape)], dim=axis)
