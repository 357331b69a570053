"""Family of models as data: where its parts are, and what the slots of its pictures hold.

One adapter (`family_adapter.py`) serves every family; the families that are shipped are in
`families.py`. What differs between models is a path, a name of an argument, or a few lines that say
which slots share a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from tokenprune.adapter import ModelAdapter
from tokenprune.kept_patches import Kind, Origin
from tokenprune.placement import Positions
from tokenprune.plugins import ModelPlugin
from tokenprune.trial import Trial

from .anatomy import Anatomy, part
from .names import Argument, Call
from .outputs import Field

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Encoded:
    """One call of a method that encodes pictures or videos, and what it gave.

    Attributes:
        core: the model without its head.
        call: the call.
        elements: `(slots, channels)` of each element of the features, in order.
    """

    core: Any
    call: Call
    elements: Sequence[Tensor]
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    def once(self, make: Callable[[Encoded], T]) -> T:
        """What `make` makes of this, which is made once however often it is asked for."""
        if make not in self._made:
            self._made[make] = make(self)
        made: T = self._made[make]
        return made


@dataclass(frozen=True)
class Sight:
    """Sight: a kind of picture that a family takes, images or videos.

    A row is what shares a budget: a picture, a tile of one, or a video.

    Attributes:
        kind: ``"image"`` or ``"video"``.
        encode: name of the core's method that encodes them.
        pixels: argument that brings them.
        needs: other arguments that the method must take.
        rows: function that gives the number of slots of each row; None where each element of the
            features is one.
        patches: function that gives for each row `(slots,)` int64 on the CPU: the patch that each
            slot is, counted over the row, or -1 for none; None where all are, in raster order.
        pictures: function that gives the pixels of each row, `(rows, ...)`, zeros at the end
            changing nothing; None where the pixels are those already.
        also: fields of the output that go the way of the features (DeepStack), a list per layer.
        frames: function that gives the number of frames of each row, in which its patches stand
            one after the other, or None where a call does not tell; None for pictures.
        crop: function that gives the number of patches of a crop, by which `patches` counts on from
            crop to crop; None where a row is one crop.
    """

    kind: Kind
    encode: str
    pixels: Argument[Any]
    needs: tuple[Argument[Any], ...] = ()
    rows: Callable[[Encoded], Sequence[int]] | None = None
    patches: Callable[[Encoded], Sequence[Tensor]] | None = None
    pictures: Callable[[Encoded], Tensor] | None = None
    also: tuple[Field[Any], ...] = ()
    frames: Callable[[Encoded], Sequence[int] | None] | None = None
    crop: Callable[[Encoded], int] | None = None

    def lengths_of(self, encoded: Encoded) -> list[int]:
        """Number of slots of each row."""
        return list(map(len, encoded.elements) if self.rows is None else self.rows(encoded))

    def patches_of(self, encoded: Encoded) -> list[Tensor]:
        """The patch that each slot of each row is, see `patches`."""
        if self.patches is not None:
            return list(self.patches(encoded))
        return [torch.arange(slots, device="cpu") for slots in self.lengths_of(encoded)]

    def pixels_of(self, encoded: Encoded) -> Tensor:
        """The pixels of each row."""
        if self.pictures is not None:
            return self.pictures(encoded)
        pixels: Tensor = self.pixels.of(encoded.call)
        return pixels

    def origins_of(self, encoded: Encoded, patches: Sequence[Tensor]) -> list[Origin]:
        """What each row shows."""
        frames = None if self.frames is None else self.frames(encoded)
        crop = None if self.crop is None else self.crop(encoded)
        sizes: list[int | None] = [crop] * len(patches)
        if frames is not None:
            pairs = zip(patches, frames, strict=True)
            sizes = [int((patch >= 0).sum()) // count for patch, count in pairs]
        return [Origin(n, self.kind, patches_per_crop=size) for n, size in enumerate(sizes)]


@dataclass(frozen=True)
class Tower:
    """Tower: where its attention is read, and which patches become a token.

    Attributes:
        blocks: paths from the core to the list of blocks, of which the first that is there counts.
        members: function that gives `(tokens, members)` int64, the patches that each slot of the
            features is made of, counted over the whole call without what is in front of patches.
        attention: path from a block to its attention, which has `num_heads`.
        query: module of the attention whose output is the queries of all heads, normed if they are.
        key: the same for keys.
        fused: module that gives queries, keys and values in one, to be rotated, of pictures in a
            row (Qwen); then `query` and `key` are not looked at.
        prefix: number of tokens in front of the patches, [CLS] and registers.
        layer: block that gives the features, Python style, where the config does not say.
        packed: function that gives the number of patches of each picture of a call, where they
            stand in one row and queries and keys are rotated (Pixtral); else None.
        kinds: model types of towers that are so, where the family may have others; empty for any.
    """

    blocks: tuple[str, ...]
    members: Callable[[Encoded], Tensor]
    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    fused: str = ""
    prefix: int = 0
    layer: int = -1
    packed: Callable[[Any, Call], Sequence[int]] | None = None
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """Family of models.

    Attributes:
        name: name of the adapter.
        summary: what it is, in a line of `tokenprune list`.
        classes: full names of the classes.
        sights: the kinds of picture it takes.
        llm: path from the core to the language model.
        towers: paths from the core to the modules that encode pixels.
        tower: where their attention is read; None where it is not.
        planes: what position ids count; several (M-RoPE) cannot be counted anew.
        oldest: release of transformers from which on it is as described here; by default all that
            are supported.
        tiles: whether a row is a tile of a picture, since nobody says which tiles a picture has.
    """

    name: str
    summary: str
    classes: tuple[str, ...]
    sights: tuple[Sight, ...]
    llm: str = "language_model"
    towers: tuple[str, ...] = ("vision_tower",)
    tower: Tower | None = None
    planes: Literal["one", "time, row and column"] = "one"
    tiles: bool = False
    oldest: tuple[int, int] = (0, 0)

    @property
    def positions(self) -> Positions:
        """Position ids before the language model where a placement leaves them open."""
        return "reindexed" if self.planes == "one" else "original"

    def anatomy(self, model: nn.Module) -> Anatomy:
        """The parts of `model`."""
        core = part(model, "core", "model")
        towers = tuple(part(core, "vision tower", path) for path in self.towers)
        return Anatomy(model, core, part(core, "language model", self.llm), towers, None)


def family_plugin(
    family: Family, trials: Callable[[], Iterable[Trial]] | None = None
) -> ModelPlugin:
    """What `tokenprune_models` yields for a family.

    Args:
        family: the family.
        trials: function that gives tiny models for `tokenprune doctor`.
    """
    made, told = partial(_adapter, family), partial(facts_of, family)
    return ModelPlugin(family.name, family.summary, made, family.classes, trials, told)


def facts_of(family: Family) -> dict[str, str]:
    """What models of a family can do, by heading."""
    from .tower_attention import given_by

    signals = sorted(each.__name__ for each in given_by(family.tower))
    budgets = ["tile (per='crop')" if family.tiles else "picture"]
    if any(sight.kind == "video" for sight in family.sights):
        budgets += ["video", "frame before the LLM (per='frame')"]
    since = ".".join(map(str, family.oldest)) + " or newer" if any(family.oldest) else "all"
    return {
        "takes": " and ".join(f"{sight.kind}s" for sight in family.sights),
        "placements": "before-llm, after-layer",
        "positions before the LLM": family.positions,
        "signals of the tower": ", ".join(signals) or "none",
        "budgets are for a": ", ".join(budgets),
        "transformers": since,
    }


def _adapter(family: Family) -> ModelAdapter:
    from .family_adapter import FamilyAdapter

    return FamilyAdapter(family)
