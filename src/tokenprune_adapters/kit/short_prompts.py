"""Short prompts of a language model: what its cache holds of them, and how later passes go on.

The caller counts the prompt as the processor made it. What is computed and cached is shorter, in
every row by another number, and may become shorter again in a later turn.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tokenprune.hooks import NotCopyable
from tokenprune.report import Record
from tokenprune.untraced import untraced

from .marks import marked
from .prompt_layout import PromptLayout

C = TypeVar("C")


@dataclass(frozen=True, eq=False)
class ShortPass:
    """One pass of a language model over what is left of its new slots.

    Attributes:
        embeds: `(batch, physical, channels)` of the slots that are left.
        mask: `(batch, past + physical)` bool, False for padding and fillers.
        positions: `(batch, physical)` int64 position ids, counted anew.
        layout: which slots are left; None where all are. `layout.restore` shows hidden states at
            the caller's length.
    """

    embeds: Tensor
    mask: Tensor
    positions: Tensor
    layout: PromptLayout | None


@dataclass(frozen=True, eq=False)
class _Stored:
    """What is known of the prompts in a cache.

    Attributes:
        mask: `(batch, stored)` bool, False for padding, up to the latest pass that dropped.
        logical: slots that the caller counted up to there.
        moved: `(batch,)` int64, by how much later positions move down.
    """

    mask: Tensor
    logical: int
    moved: Tensor


class ShortPrompts(NotCopyable, Generic[C]):
    """Short prompts by the cache that holds them; what is known dies with the cache.

    >>> class Cache: ...
    >>> prompts, cache = ShortPrompts(), Cache()
    >>> embeds = torch.tensor([[[1.0], [-torch.inf], [3.0]]])  # the second one is dropped
    >>> mask, positions = torch.ones(1, 3, dtype=torch.bool), torch.arange(3)[None]
    >>> prompts.enter(cache, embeds, mask, positions).positions
    tensor([[0, 1]])
    >>> more = torch.ones(1, 4, dtype=torch.bool)  # the caller counts four slots now
    >>> turn = prompts.enter(cache, torch.ones(1, 1, 1), more, torch.tensor([[3]]))
    >>> turn.positions, turn.mask.shape
    (tensor([[2]]), torch.Size([1, 3]))
    """

    def __init__(self) -> None:
        self._stored: WeakKeyDictionary[C, _Stored] = WeakKeyDictionary()

    @untraced
    def enter(self, cache: C, embeds: Tensor, mask: Tensor, positions: Tensor) -> ShortPass:
        """Take marked slots out of a pass; translate masks and positions of one that goes on.

        Args:
            cache: cache of the pass; any object that can be weakly referenced and hashed.
            embeds: `(batch, new, channels)`, rows of -inf where a slot is dropped (`marks`).
            mask: `(batch, past + new)` bool as the caller counts, False for padding.
            positions: `(batch, new)` int64 as the caller counts.
        """
        new, known = embeds.shape[1], self._stored.get(cache)
        past = mask.shape[1] - new
        if known is not None:
            positions = positions - known.moved[:, None]
        before = mask[:, :past] if known is None else self._past(known, mask[:, :past])
        real = mask[:, past:]
        dropped = marked(embeds) if new > 1 else None
        if dropped is None or not bool(dropped.any()):
            return ShortPass(embeds, torch.cat([before, real], dim=1), positions, None)
        keep = real & ~dropped
        layout = PromptLayout.of(keep)
        moved = dropped.sum(1) if known is None else known.moved + dropped.sum(1)
        stored = torch.cat([before, layout.shorten(keep)], dim=1)
        self._stored[cache] = _Stored(stored, mask.shape[1], moved)
        positions = layout.shorten(positions - dropped.cumsum(1))
        return ShortPass(layout.shorten(embeds), stored, positions, layout)

    def report(self, record: Record, cells: Iterable[Tensor], logical: int) -> None:
        """Note the bytes of KV cache after a prefill, and what the whole prompt would have taken.

        Args:
            record: where to note it.
            cells: keys and values of every layer, `(batch, heads, stored, channels)`.
            logical: slots as the caller counts them.
        """
        stored = whole = 0
        for each in cells:
            size = each.numel() * each.element_size()
            stored += size
            whole += size // each.shape[-2] * logical
        record.cached(stored, whole)

    @staticmethod
    def _past(known: _Stored, mask: Tensor) -> Tensor:
        return torch.cat([known.mask, mask[:, known.logical :]], dim=1)
