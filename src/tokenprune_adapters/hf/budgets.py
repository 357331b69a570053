"""What the budgets of stages are for: a picture or video, or a crop or frame of one."""

from __future__ import annotations

from tokenprune.budget import Budgeted, Per
from tokenprune.errors import UnsupportedError
from tokenprune.placement import BeforeLLM
from tokenprune.spec import shown
from tokenprune.strategy import Stage

from .family import Family


def budgets_are_for(family: Family, stages: tuple[Stage, ...]) -> Per:
    """What all budgets are for.

    To a family whose pictures are not cut, a frame is a crop, and a picture is one of its own.

    Raises:
        UnsupportedError: something that the family does not hand over, or budgets that differ.
    """
    cut, frames = "image" in family.divided, "video" in family.divided
    inside = any(not isinstance(stage.placement, BeforeLLM) for stage in stages)
    found: set[Per] = set()
    steps = ((step, stage.placement) for stage in stages for step in stage.strategy.steps)
    for step, placement in steps:
        if not isinstance(step, Budgeted):
            continue
        words, per = f"per={step.per!r} in {shown(step)!r}", step.per
        if per == "frame" and not frames:
            raise UnsupportedError(f"{words}: {family.name} has no frames")
        if per == "crop" and not cut and not family.tiles:
            per = "frame" if frames else "image"
        if per == "crop" and cut and not isinstance(placement, BeforeLLM):
            raise UnsupportedError(
                f"{words}: inside the language model crops are packed into one sequence; give a "
                "budget per image"
            )
        found.add(per)
    if "crop" in found and cut and inside:
        raise UnsupportedError(
            "per='crop' before the LLM cannot be combined with stages after a layer; give a budget "
            "per image"
        )
    if len(found) > 1:
        raise UnsupportedError(f"steps of all stages must share per, got {sorted(found)}")
    return found.pop() if found else "image"
