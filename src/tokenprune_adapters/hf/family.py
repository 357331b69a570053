"""Family of models as data: where its parts are, and what the slots of its pictures hold.

One adapter (`family_adapter.py`) serves every family; the families that are shipped are in
`families.py`. What differs between models is a path, a name of an argument, or a few lines that say
which slots share a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from tokenprune.budget import Per
from tokenprune.kept_patches import Kind
from tokenprune.placement import Positions

from .anatomy import Anatomy, part
from .names import Argument, Call
from .outputs import Field

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Encoded:
    """One call of a method that encodes pictures or videos, and what it gave.

    Attributes:
        core: the model without its head.
        call: the call, or the one of the model that takes what was encoded.
        elements: `(slots, channels)` of each element of the features, in order; none before the
            projector.
        per: what budgets are for.
        noted: crops or frames of each row, as the attached model noted them on what it encoded;
            None where it did not.
    """

    core: Any
    call: Call
    elements: Sequence[Tensor] = ()
    per: Per = "image"
    noted: Sequence[int] | None = None
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    def once(self, make: Callable[[Encoded], T]) -> T:
        """What `make` makes of this, which is made once however often it is asked for."""
        if make not in self._made:
            self._made[make] = make(self)
        made: T = self._made[make]
        return made


class Run(NamedTuple):
    """Run of placeholders in a prompt, and the token in front of it."""

    tokens: int
    before: int


@dataclass(frozen=True)
class Sight:
    """Sight: a kind of picture that a family takes, images or videos.

    A row is a picture, a video, or a tile where the prompt says which picture it is of.

    Attributes:
        kind: ``"image"`` or ``"video"``.
        encode: name of the core's method that encodes them.
        pixels: argument that brings them.
        needs: other arguments that the method must take.
        rows: function that gives the number of slots of each row; None where each element of the
            features is one, or `patches` tells.
        patches: function that gives for each row `(slots,)` int64 on the CPU: the patch that each
            slot is, counted over the row, or -1 for none; or None where a call does not tell. None
            where all are, in raster order.
        pictures: function that gives the pixels of each row, `(rows, ...)`, zeros at the end
            changing nothing; None where the pixels are those already.
        also: fields of the output that go the way of the features (DeepStack), a list per layer.
        crops: function that gives the number of crops of each picture, or of frames of each video,
            whose patches are counted one after the other; or None where a call does not tell. None
            where a row is one.
        crop: function that gives the number of patches of a crop; None where all that are counted
            are there, so that it follows.
        newlines: whether slots without a patch are newlines, which may be dropped.
        beside: function that gives the number of tokens in front of the patches of each crop that
            enter the projector with them, and are no patches; None for none.
        joined: function that gives, for the runs of placeholders of a prompt and the tokens of a
            tile, the number of tiles of each picture, where a row is a tile; None where rows are
            pictures or videos.
    """

    kind: Kind
    encode: str
    pixels: Argument[Any]
    needs: tuple[Argument[Any], ...] = ()
    rows: Callable[[Encoded], Sequence[int]] | None = None
    patches: Callable[[Encoded], Sequence[Tensor] | None] | None = None
    pictures: Callable[[Encoded], Tensor] | None = None
    also: tuple[Field[Any], ...] = ()
    crops: Callable[[Encoded], Sequence[int] | None] | None = None
    crop: Callable[[Encoded], int] | None = None
    newlines: bool = False
    beside: Callable[[Any], int] | None = None
    joined: Callable[[Sequence[Run], int], Sequence[int]] | None = None

    def told(self, encoded: Encoded) -> list[Tensor] | None:
        """The patch that each slot of each row is, see `patches`; None where nothing tells."""
        if self.patches is not None:
            made = self.patches(encoded)
            return None if made is None else list(made)
        slots = map(len, encoded.elements) if self.rows is None else self.rows(encoded)
        return [torch.arange(each, device="cpu") for each in slots]

    def pixels_of(self, encoded: Encoded) -> Tensor:
        """The pixels of each row."""
        if self.pictures is not None:
            return self.pictures(encoded)
        pixels: Tensor = self.pixels.of(encoded.call)
        return pixels


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
        tower: where their attention is read; None where it is not, or where the towers have
            adapters of their own.
        projector: path from the core to a projector that works token by token on all that towers
            with adapters give, so that what is dropped is not projected; empty where the reduction
            is behind the projector.
        planes: what position ids count; several (M-RoPE) cannot be counted anew.
        states: whether some layers of the language model have a state that runs along (linear
            attention), so that nothing can be left out after a layer.
        oldest: release of transformers from which on it is as described here; by default all that
            are supported.
        methods: other methods of the core that are called, with arguments that they must take.
        variants: families of the same classes with towers of other types, see `Tower.kinds`.
    """

    name: str
    summary: str
    classes: tuple[str, ...]
    sights: tuple[Sight, ...]
    llm: str = "language_model"
    towers: tuple[str, ...] = ("vision_tower",)
    tower: Tower | None = None
    projector: str = ""
    planes: Literal["one", "time, row and column"] = "one"
    states: bool = False
    oldest: tuple[int, int] = (0, 0)
    methods: tuple[tuple[str, tuple[Argument[Any], ...]], ...] = ()
    variants: tuple[Family, ...] = ()

    @property
    def positions(self) -> Positions:
        """Position ids before the language model where a placement leaves them open."""
        return "reindexed" if self.planes == "one" else "original"

    @property
    def divided(self) -> frozenset[Kind]:
        """The kinds of picture that consist of crops or frames."""
        return frozenset(sight.kind for sight in self.sights if sight.crops is not None)

    @property
    def tiles(self) -> bool:
        """Whether a row is a tile of a picture."""
        return any(sight.joined is not None for sight in self.sights)

    def of(self, model: nn.Module) -> Family:
        """This family, or the variant that `model` is by the type of its tower."""
        config: Any = model.config
        kind = config.vision_config.model_type if self.variants else ""
        fits = (each for each in self.variants if each.tower and kind in each.tower.kinds)
        return next(fits, self)

    def anatomy(self, model: nn.Module) -> Anatomy:
        """The parts of `model`."""
        core = part(model, "core", "model")
        llm = part(core, "language model", self.llm)
        part(llm, "decoder layers", "layers")
        towers = tuple(part(core, "vision tower", path) for path in self.towers)
        projector = part(core, "projector", self.projector) if self.projector else None
        return Anatomy(model, core, llm, towers, projector)
