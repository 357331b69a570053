"""Tiles of which pictures: told by where they stand in prompts, which nobody knows before.

`generate` encodes pictures before it shows the model a prompt. So tiles wait, with what the tower
says of them, for the call that brings both.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import UnsupportedError
from tokenprune.hooks import NotCopyable
from tokenprune.kept_patches import Origin
from tokenprune.signals import Signals
from tokenprune.to_device import numbers_on

from ..kit.before_projector import Ids
from ..kit.budget_rows import BudgetRows
from .anatomy import Anatomy
from .behind_projector import BehindProjector, features_of, flat_of
from .family import Encoded, Run, Sight
from .llm.copies import without_copies
from .llm.signal_cache import SignalCache, refuse_unknown
from .outputs import Output
from .picture_rows import PictureRow
from .slots import Slots


@dataclass(frozen=True)
class Joined:
    """Pictures of a batch of prompts.

    Attributes:
        rows: the tiles of each picture as one row.
        tiles: number of tiles of each.
        prints: fingerprints of all tiles, by which they are known.
        origins: what each picture is; None for a copy, which `generate` makes for beams.
    """

    rows: list[PictureRow]
    tiles: list[int]
    prints: list[int]
    origins: Sequence[Origin | None]


@dataclass(eq=False)
class Tiles(NotCopyable):
    """Tiles that wait for the prompts that tell which of them are of one picture.

    Attributes:
        parts: the parts of the model.
        reduce: reduces pictures.
        waiting: what is known of tiles.
    """

    parts: Anatomy
    reduce: BehindProjector
    waiting: SignalCache

    def note(self, sight: Sight, encoded: Encoded, raw: Any, rows: Sequence[PictureRow]) -> None:
        """Take what is known of tiles."""
        _, known = replace(self.reduce, strategy=None, followed=True)(sight, encoded, raw, rows)
        self.waiting.put(features_of(raw, rows), known)

    def join(
        self, sight: Sight, ids: Tensor, raw: Any, tiles: Sequence[PictureRow]
    ) -> Joined | None:
        """Tiles as pictures, by the prompts' token ids; None where placeholders are others."""
        assert sight.joined is not None
        slots = len(tiles[0].slots)
        prompts = _runs(ids, self.parts.placeholders(ids, sight.kind))
        if sum(run.tokens for runs in prompts for run in runs) != slots * len(tiles):
            return None
        left, rows = iter(tiles), list[PictureRow]()
        counts, owners = list[int](), list[int]()
        for number, runs in enumerate(prompts):
            broken = [run.tokens for run in runs if run.tokens % slots]
            if broken:
                raise UnsupportedError(
                    f"a tile has {slots} tokens, but {broken[0]} placeholders stand next to each "
                    "other, so it is not known which tiles are of one picture; give budgets "
                    "per='crop'"
                )
            for count in sight.joined(runs, slots):
                rows.append(_as_one(list(itertools.islice(left, count)), len(rows)))
                counts.append(count)
                owners.append(number)
        prints = self.waiting.numbers(features_of(raw, tiles))
        return Joined(rows, counts, prints, self._given(rows, counts, prints, owners, len(prompts)))

    def _given(
        self,
        rows: list[PictureRow],
        tiles: list[int],
        prints: list[int],
        owners: list[int],
        batch: int,
    ) -> Sequence[Origin | None]:
        """What each picture is, see `Joined.origins`."""
        left = iter(prints)
        pictures = [tuple(itertools.islice(left, count)) for count in tiles]
        known = self.waiting.times(prints)
        times = {hash(each): min(known.get(one, 1) for one in each) for each in pictures}
        origins = [row.origin for row in rows]
        return without_copies(origins, list(map(hash, pictures)), owners, batch, times)

    def __call__(self, sight: Sight, raw: Any, joined: Joined) -> tuple[Any, Signals]:
        """The output with marks, and what is known of the tokens that are left of pictures."""
        flat, _, _ = flat_of(Output(raw).features)
        known = self.waiting.get(joined.prints, flat.device)
        if self.reduce.strategy is not None:
            refuse_unknown(self.reduce.strategy.signals, known)
        tokens = [len(row.tokens) for row in joined.rows]
        numbers = torch.split(torch.arange(sum(tokens), device="cpu"), tokens)
        size = sum(tokens) // len(joined.prints)
        rows = BudgetRows.of(list(numbers), size, [row.origin for row in joined.rows])
        ids = known.get(Ids(), torch.tensor(joined.prints, device=flat.device))
        return self.reduce.decide(
            sight,
            raw,
            Slots.of(joined.rows, flat.device),
            rows.to(flat.device).signals(known),
            _together(ids, joined.tiles),
            joined.origins,
        )


def _runs(ids: Tensor, held: Tensor) -> list[list[Run]]:
    """Runs of placeholders in each prompt. One sync.

    Args:
        ids: `(batch, slots)` int64.
        held: `(batch, slots)` bool, True for placeholders.
    """
    ids, held = torch.stack([ids, held.long()]).cpu()
    none = held.new_zeros(len(held), 1)
    before = torch.cat([none - 1, ids[:, :-1]], dim=1)
    starts = (held - torch.cat([none, held[:, :-1]], dim=1)) > 0
    ends = (held - torch.cat([held[:, 1:], none], dim=1)) > 0
    (prompts, first), (_, last) = starts.nonzero().T, ends.nonzero().T
    told = torch.stack([prompts, last + 1 - first, before[prompts, first]], dim=1).tolist()
    runs: list[list[Run]] = [[] for _ in range(len(ids))]
    for prompt, tokens, token in told:
        runs[prompt].append(Run(tokens, token))
    return runs


def _as_one(tiles: Sequence[PictureRow], number: int) -> PictureRow:
    """Tiles as one row, whose patches are counted on from tile to tile."""
    size = len(tiles[0].tokens)
    patches = [
        torch.where(tile.patches >= 0, tile.patches + at * size, -1)
        for at, tile in enumerate(tiles)
    ]
    return PictureRow(
        torch.cat([tile.slots for tile in tiles]),
        torch.cat(patches),
        replace(tiles[0].origin, number=number, patches_per_crop=size),
    )


def _together(ids: Tensor, tiles: Sequence[int]) -> Tensor:
    """`(pictures,)` int64 of the `(tiles,)` int64 of all tiles of each, in their order."""
    at = [place for count in tiles for place in range(count)]
    owners = [picture for picture, count in enumerate(tiles) for _ in range(count)]
    weights, owner = (numbers_on(ids.device, each) for each in (at, owners))
    return ids.new_zeros(len(tiles)).index_add(0, owner, ids * (2 * weights + 1))
