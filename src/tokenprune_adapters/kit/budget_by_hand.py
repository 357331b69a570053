"""Choice of a budget, and of the tokens that it keeps, from scores that were read by hand."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def clear_budget(scores: Iterable[Tensor], dtype: torch.dtype) -> int:
    """Tokens to keep of every picture: about a quarter, the last of them well ahead of the next.

    Scores that are computed in another way differ by rounding, which must not change what is kept.

    Args:
        scores: `(tokens,)` of each picture.
        dtype: what the model computes in.

    >>> clear_budget([torch.tensor([0.1, 0.9, 0.8, 0.1, 0.1, 0.1, 0.1, 0.1])], torch.bfloat16)
    2
    """
    ordered = [each.float().sort(descending=True).values for each in scores]
    fewest = min(map(len, ordered))
    most = max(fewest * 3 // 4, 2)
    # How far the k-th score is ahead of the next, from k = 1 on, in the worst of the pictures.
    ahead = torch.stack([each[:most] / each[1 : most + 1] - 1 for each in ordered]).amin(0).tolist()
    clear = [k for k, lead in enumerate(ahead, start=1) if lead > torch.finfo(dtype).eps ** 0.5]
    if clear:
        return min(clear, key=lambda k: abs(k - fewest / 4))
    return 1 + ahead.index(max(ahead))


def kept(groups: Iterable[Tensor], scores: Tensor, keep: int, shift: int = 0) -> Tensor:
    """Slots that are left, in order, when the best `keep` of every group stay.

    Args:
        groups: slots of the patches of each picture.
        scores: `(slots,)`; what is in no group stays whatever its score.
        keep: how many stay of a group.
        shift: places that the kept ones move within their group, which is wrong.

    >>> kept([torch.tensor([1, 2, 3])], torch.tensor([0.0, 0.5, 0.1, 0.3, 0.0]), keep=2)
    tensor([0, 1, 3, 4])
    """
    stays = torch.ones_like(scores, dtype=torch.bool)
    for group in groups:
        best = scores[group].float().sort(descending=True, stable=True).indices[:keep]
        stays[group] = False
        stays[group[(best + shift) % len(group)]] = True
    return stays.nonzero()[:, 0]
