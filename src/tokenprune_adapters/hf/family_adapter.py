"""Adapter of every model that a `Family` describes."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from tokenprune.adapter import ModelAdapter
from tokenprune.budget import Budgeted, Per
from tokenprune.errors import UnsupportedError
from tokenprune.hooks import Removable
from tokenprune.observation import Attended
from tokenprune.placement import BeforeLLM, Placement
from tokenprune.report import Record
from tokenprune.signals import Signal
from tokenprune.spec import shown
from tokenprune.strategy import Stage

from .checks import check_family
from .chunked_prefill import lost_images_guard
from .encoders import Encoders
from .family import Family
from .llm.signal_cache import SignalCache
from .stage_hooks import FindImages, Placed, check_placement, readable
from .tower_attention import ReadTower, given_by
from .watch_attention import WatchAttention


class FamilyAdapter(ModelAdapter):
    """Adapter that reduces what a model puts at placeholders, or after its layers, or both.

    What is reduced before the language model is what its method for pictures gives, behind the
    projector, where each slot is a token.

    Args:
        family: the family of the models.
    """

    def __init__(self, family: Family) -> None:
        self.family = family

    def provides(self, model: nn.Module, placement: Placement) -> frozenset[type[Signal]]:
        check_placement(model, placement)
        check_family(self.family, self.family.anatomy(model), placement)
        counted = getattr(placement, "positions", None) == "reindexed"
        if counted and self.family.planes != "one":
            raise UnsupportedError(
                f"positions of {type(model).__name__} have a {self.family.planes}, which cannot "
                "be counted anew where tokens are dropped; use positions='original', or leave it "
                "out"
            )
        if isinstance(placement, BeforeLLM) and placement.newline == "drop":
            raise UnsupportedError(f"newline='drop' is not offered by {self.family.name}")
        return readable(placement, given_by(self.family.tower))

    def install(
        self, model: nn.Module, stages: tuple[Stage, ...], record: Record
    ) -> Iterator[Removable]:
        parts = self.family.anatomy(model)
        per = _per(self.family, stages)
        placed = Placed.of(stages, parts.llm)
        store = SignalCache(parts.core.get_input_embeddings().weight.dtype)
        reader = None
        if placed.of_tower:
            assert self.family.tower is not None
            reader = ReadTower(parts.core, self.family.tower, placed.of_tower)
            yield from reader.install()
        later = store if placed.inside else None
        encoders = Encoders(parts, self.family.sights, placed.strategy, record, later, reader, per)
        if placed.before is not None or placed.inside:
            yield from encoders.install()
        find = FindImages(parts.core, encoders.find, encoders.encode_now)
        yield from placed.install(
            parts, find, store, record, self.family.positions, self.family.planes != "one"
        )
        yield from lost_images_guard(parts)

    def watch(self, model: nn.Module, attended: Attended) -> Iterator[Removable]:
        self.provides(model, BeforeLLM())
        parts = self.family.anatomy(model)
        store = SignalCache(parts.core.get_input_embeddings().weight.dtype)
        encoders = Encoders(parts, self.family.sights, None, Record(), store, None)
        yield from encoders.install()
        find = FindImages(parts.core, encoders.find, encoders.encode_now)
        yield from WatchAttention(parts, find, attended).install()
        yield from lost_images_guard(parts)


def _per(family: Family, stages: tuple[Stage, ...]) -> Per:
    """What budgets are for, which must be something that a family hands over."""
    frames = any(sight.frames is not None for sight in family.sights)
    found: set[Per] = set()
    for stage in stages:
        for step in stage.strategy.steps:
            if not isinstance(step, Budgeted):
                continue
            found.add(step.per)
            words = f"per={step.per!r} in {shown(step)!r}"
            # None of a picture is none of a tile.
            counts = isinstance(step.keep, int) and step.keep > 0
            if family.tiles and step.per == "image" and counts:
                raise UnsupportedError(
                    f"{shown(step)!r} counts tokens of a picture, but {family.name} hands over "
                    "tiles without saying which picture they are of; give per='crop', or keep as "
                    "a fraction"
                )
            if step.per == "crop" and not family.tiles:
                raise UnsupportedError(
                    f"{words}: budgets of {family.name} are for a picture, or for a video over all "
                    "its frames; use per='image', the default"
                )
            if step.per == "frame" and not frames:
                raise UnsupportedError(f"{words}: {family.name} has no frames")
            if step.per == "frame" and not isinstance(stage.placement, BeforeLLM):
                raise UnsupportedError(
                    f"{words}: inside the language model videos are all that is known; give a "
                    "budget per image"
                )
    if "frame" in found and (len(found) > 1 or len(stages) > 1):
        raise UnsupportedError(
            "per='frame' cannot be combined with other budgets, or with stages after a layer; "
            "give all steps per='frame', or none"
        )
    return "frame" if "frame" in found else "image"
