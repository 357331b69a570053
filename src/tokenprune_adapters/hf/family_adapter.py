"""Adapter of every model that a `Family` describes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from torch import nn

from tokenprune.adapter import ModelAdapter
from tokenprune.errors import UnsupportedError
from tokenprune.hooks import Removable
from tokenprune.observation import Attended
from tokenprune.placement import BeforeLLM, Newline, Placement
from tokenprune.report import Record
from tokenprune.signals import ClsAttention, Signal
from tokenprune.strategy import Stage

from .anatomy import Anatomy
from .before_projector import BeforeProjector, check_select_strategy, tower_adapter
from .behind_projector import BehindProjector
from .budgets import budgets_are_for
from .call_images import CallImages
from .checks import check_family
from .chunked_prefill import lost_images_guard
from .encoders import Encoders
from .family import Family
from .llm.signal_cache import SignalCache
from .stage_hooks import FindImages, Placed, check_placement, readable
from .tiles import Tiles
from .tower_attention import ReadTower, given_by
from .watch_attention import WatchAttention


class FamilyAdapter(ModelAdapter):
    """Adapter that reduces pictures before the language model, or after its layers, or both.

    The language model computes and caches, from each place on, the tokens kept there. Before it,
    what is dropped is not projected either, where the projector works token by token; else what
    the method for pictures gives is reduced, in which each slot is a token. Packing, unpadding and
    newlines stay the model's own. Slots without a patch, such as newlines and a [CLS] that a model
    shows, are kept and never counted.

    Args:
        family: the family of the models.
    """

    options: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "per": ("crop", "frame"),
        "positions": ("original", "reindexed"),
        "newline": ("drop",),
    }

    def __init__(self, family: Family) -> None:
        self.family = family

    def provides(self, model: nn.Module, placement: Placement) -> frozenset[type[Signal]]:
        check_placement(model, placement)
        family = self.family.of(model)
        parts = family.anatomy(model)
        check_family(family, parts, placement)
        if getattr(placement, "positions", None) == "reindexed" and family.planes != "one":
            raise UnsupportedError(
                f"positions of {type(model).__name__} have a {family.planes}, which cannot "
                "be counted anew where tokens are dropped; use positions='original', or leave it "
                "out"
            )
        newlines = any(sight.newlines for sight in family.sights)
        if _newline(placement) == "drop" and not newlines:
            raise UnsupportedError(
                f"newline='drop' is not offered by {family.name}, whose pictures have no newlines"
            )
        if parts.projector is None:
            return readable(placement, given_by(family.tower))
        tower = parts.towers[0]  # several are made from one config
        of_tower = tower_adapter(tower).provides(tower)
        check_select_strategy(parts, has_cls=ClsAttention in of_tower)
        return readable(placement, of_tower)

    def install(
        self, model: nn.Module, stages: tuple[Stage, ...], record: Record
    ) -> Iterator[Removable]:
        family = self.family.of(model)
        parts = family.anatomy(model)
        per = budgets_are_for(family, stages)
        placed = Placed.of(stages, parts.llm)
        store = _store(parts)
        later = store if placed.inside else None
        newline: Newline = "keep" if placed.before is None else _newline(placed.before.placement)
        reduce = _reduction(family, parts, placed, record)
        tiles = _waiting(family, parts, reduce) if per == "image" else None
        encoders = Encoders(parts, family.sights, reduce, record, later, per, newline, tiles)
        images = CallImages(parts, family.sights, later, per, tiles)
        if placed.before is not None or placed.inside:
            yield from encoders.install()
            yield from images.install()
        find = FindImages(parts.core, images.find, images.encode_now)
        yield from placed.install(
            parts, find, store, record, family.positions, family.planes != "one"
        )
        yield from lost_images_guard(parts)

    def watch(self, model: nn.Module, attended: Attended) -> Iterator[Removable]:
        self.provides(model, BeforeLLM())
        family = self.family.of(model)
        parts = family.anatomy(model)
        store = _store(parts)
        record = Record()
        reduce = BehindProjector(None, record, followed=True, reader=None)
        tiles = _waiting(family, parts, reduce)
        encoders = Encoders(parts, family.sights, reduce, record, store, tiles=tiles)
        images = CallImages(parts, family.sights, store, tiles=tiles)
        yield from encoders.install()
        yield from images.install()
        find = FindImages(parts.core, images.find, images.encode_now)
        yield from WatchAttention(parts, find, attended).install()
        yield from lost_images_guard(parts)


def _newline(placement: Placement) -> Newline:
    return placement.newline if isinstance(placement, BeforeLLM) else "keep"


def _store(parts: Anatomy) -> SignalCache:
    return SignalCache(lambda: parts.core.get_input_embeddings().weight.dtype)


def _waiting(
    family: Family, parts: Anatomy, reduce: BeforeProjector | BehindProjector
) -> Tiles | None:
    """Where tiles wait for their prompts, of a family that encodes tiles."""
    if not family.tiles:
        return None
    assert isinstance(reduce, BehindProjector)
    return Tiles(parts, reduce, _store(parts))


def _reduction(
    family: Family, parts: Anatomy, placed: Placed, record: Record
) -> BeforeProjector | BehindProjector:
    """What reduces the features that are encoded."""
    followed = bool(placed.inside)
    if parts.projector is not None:
        return BeforeProjector(
            parts, family.sights, placed.strategy, record, followed, placed.of_tower
        )
    reader = None
    if placed.of_tower:
        assert family.tower is not None
        reader = ReadTower(parts.core, family.tower, placed.of_tower)
    return BehindProjector(placed.strategy, record, followed, reader)
