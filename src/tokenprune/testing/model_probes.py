"""Probes that checks of model adapters share: how to attach, and how to compare answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from ..attachment import Attachment, attach
from ..placement import Placement
from ..reducers import Evict
from ..strategy import Stage, Strategy
from .cases import ModelCase, Prompt
from .promises import require

HALF = 0.5


Places: TypeAlias = Placement | tuple[Placement, ...]


def stages_at(case: ModelCase, places: Places, keep: int | float) -> tuple[Stage, ...]:
    """Stages that keep so much at the places."""
    strategy = Strategy(case.scorer, Evict(keep))
    return tuple(map(strategy.at, places if isinstance(places, tuple) else (places,)))


def attached(
    case: ModelCase, model: nn.Module, places: Places, keep: int | float = HALF
) -> Attachment:
    """`model` with these stages at work."""
    return attach(model, *stages_at(case, places, keep), adapter=case.adapter)


def everything(case: ModelCase) -> tuple[nn.Module, Sequence[Prompt], dict[str, Any]]:
    """A model, prompts, and all of them in a batch."""
    prompts = case.prompts()
    return case.build(), prompts, case.collate(prompts)


def close(case: ModelCase, got: Tensor, expected: Tensor, what: str) -> None:
    """See that logits are equal but for rounding."""
    require(
        got.shape == expected.shape,
        f"{case.name}: {what}: the shape is {tuple(got.shape)}, not {tuple(expected.shape)}",
    )
    gap = float((got.double() - expected.double()).abs().max())
    scale = max(1.0, float(expected.abs().max()))
    # NaN is not <= anything.
    require(gap <= case.tolerance * scale, f"{case.name}: {what}: logits differ by {gap}")


def chosen_slots(attachment: Attachment) -> list[list[int]]:
    """Kept slots of every image of the latest reduction."""
    plan = attachment.last.plan
    return [row[mask].tolist() for row, mask in zip(plan.anchors, plan.mask, strict=True)]
