"""Copies of pictures: which images of expanded prompts are those that were given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tokenprune.kept_patches import Origin


def without_copies(
    origins: Sequence[Origin],
    prints: Sequence[int],
    rows: Sequence[int],
    batch: int,
    times: Mapping[int, int],
) -> tuple[Origin | None, ...]:
    """What each image is, counted anew without copies; None for a copy.

    `generate` puts copies of a prompt right behind it, as many for each prompt. Where images were
    repeated in another way, the first ones are taken for those that were given.

    Args:
        origins: what each image is, copies counted like others.
        prints: a number for each image, the same for equal ones.
        rows: the prompt that each is in, ascending.
        batch: number of prompts.
        times: how often each print was encoded; left out where nobody knows.

    >>> one, two = Origin(0), Origin(1)
    >>> without_copies([one, two], [7, 7], [0, 1], 2, {7: 1})
    (Origin(number=0, kind='image', crop=0, patches_per_crop=None), None)
    >>> without_copies([one, two], [7, 7], [0, 1], 2, {7: 2}) == (one, two)
    True
    """
    came = Counter(prints)
    size = max((count // times.get(each, count) for each, count in came.items()), default=1)
    if size > 1 and _is_expanded(prints, rows, batch, size):
        given = [row % size == 0 for row in rows]
    else:
        seen: Counter[int] = Counter()
        given = []
        for each in prints:
            seen[each] += 1
            given.append(seen[each] <= times.get(each, came[each]))
    numbers: dict[tuple[bool, int], int] = {}
    counts: Counter[str] = Counter()
    for origin, mine in zip(origins, given, strict=True):
        if mine and origin.order not in numbers:
            numbers[origin.order] = counts[origin.kind]
            counts[origin.kind] += 1
    return tuple(
        replace(origin, number=numbers[origin.order]) if mine else None
        for origin, mine in zip(origins, given, strict=True)
    )


def _is_expanded(prints: Sequence[int], rows: Sequence[int], batch: int, size: int) -> bool:
    """Whether each `size` prompts, one after the other, have the same images."""
    of_row: list[list[int]] = [[] for _ in range(batch)]
    for each, row in zip(prints, rows, strict=True):
        of_row[row].append(each)
    return batch % size == 0 and all(
        of_row[row] == of_row[row - row % size] for row in range(batch)
    )
