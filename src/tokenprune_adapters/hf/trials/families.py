"""Families: the plain model under masks that hide what is dropped, beside the attached one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.spec import parse
from tokenprune.trial import Cut, Questions, Trial

from ...kit.budget_by_hand import clear_budget
from ..checks import VERSION
from ..families import LLAVA_PIXTRAL
from ..family import Family
from . import oracle
from .attention_maps import eager
from .chat import LAYER, answer
from .prompts import collated, words
from .tiny import tiny
from .tiny_families import TINY


@dataclass(frozen=True, eq=False)
class Seen:
    """Three pictures, as a processor would hand them over.

    Attributes:
        arguments: pixels, and whatever else the model takes with them.
        patches: for each picture `(slots,)` int64, the patch that each is, or -1 for none.
        front: token ids in front of each.
    """

    arguments: dict[str, Tensor]
    patches: Sequence[Tensor]
    front: tuple[int, ...] = ()

    @classmethod
    def alike(cls, arguments: dict[str, Tensor], slots: int) -> Seen:
        """Three pictures of as many slots, all of them patches."""
        return cls(arguments, [torch.arange(slots)] * 3)


def _noise(model: Any, *shape: int) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return made.to(model.device, model.dtype)


def _side(length: Any) -> int:
    """Of a square, of which some configs give both sides."""
    return int(length[0] if isinstance(length, (list, tuple)) else length)


def _packed(model: Any) -> Seen:
    """Qwen: patches of all pictures in a row."""
    vision = model.config.vision_config
    merge = int(vision.spatial_merge_size)
    channels = int(getattr(vision, "in_channels", getattr(vision, "in_chans", 3)))
    grids = [(1, 4 * merge, (4 + number) * merge) for number in range(3)]
    sizes = [high * wide for _, high, wide in grids]
    width = channels * int(vision.temporal_patch_size) * int(vision.patch_size) ** 2
    return Seen(
        {
            "pixel_values": _noise(model, sum(sizes), width),
            "image_grid_thw": torch.tensor(grids, device=model.device),
        },
        [torch.arange(size // merge**2) for size in sizes],
        (model.config.vision_start_token_id,),
    )


def _tiles(model: Any) -> Seen:
    """InternVL: a tile each."""
    config = model.config
    side, patch = _side(config.vision_config.image_size), _side(config.vision_config.patch_size)
    slots = round(side // patch * config.downsample_ratio) ** 2
    return Seen.alike({"pixel_values": _noise(model, 3, 3, side, side)}, slots)


def _tiles_of_prompts(model: Any) -> Seen:
    """SmolVLM, Idefics3: a tile each, by prompt; the first prompt is filled up by zeros."""
    side, slots = model.config.vision_config.image_size, model.model.image_seq_len
    pixels = _noise(model, 2, 2, 3, side, side)
    pixels[0, 1] = 0
    return Seen.alike({"pixel_values": pixels}, slots)


def _anyres(model: Any) -> Seen:
    """LLaVA-OneVision, -NeXT-Video: a base view and the tiles of a wide picture, with newlines."""
    config = model.config
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    size = min(config.image_grid_pinpoints, key=lambda each: (each[0] >= each[1], sum(each)))
    down, across, cells = size[0] // side, size[1] // side, side // patch
    rows = torch.arange(cells**2, cells**2 * (1 + down * across)).reshape(down * cells, -1)
    ended = torch.cat([rows, torch.full((len(rows), 1), -1)], dim=1)
    pixels = _noise(model, 3, 1 + down * across, 3, side, side)
    sizes = torch.tensor([size] * 3, device=model.device)
    slots = torch.cat([torch.arange(cells**2), ended.flatten()])
    return Seen({"pixel_values": pixels, "image_sizes": sizes}, [slots] * 3)


def _whole(model: Any) -> Seen:
    """VipLlava: a square each."""
    vision = model.config.vision_config
    side = vision.image_size
    slots = (side // vision.patch_size) ** 2
    return Seen.alike({"pixel_values": _noise(model, 3, 3, side, side)}, slots)


def _any_size(model: Any) -> Seen:
    """Pixtral towers: any size."""
    config = model.config
    token = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    sizes = torch.tensor([[4 * token, 5 * token]] * 3, device=model.device)
    pixels = _noise(model, 3, 3, 4 * token, 5 * token)
    return Seen.alike({"pixel_values": pixels, "image_sizes": sizes}, 20)


_SEEN: dict[str, tuple[Callable[[Any], Seen], tuple[str, ...]]] = {
    "hf-qwen2-vl": (_packed, ("qwen2-vl",)),
    "hf-qwen2-5-vl": (_packed, ("qwen2.5-vl",)),
    "hf-qwen3-vl": (_packed, ("qwen3-vl", "qwen3-vl-moe")),
    "hf-qwen3-5": (_packed, ("qwen3.5", "qwen3.5-moe")),
    "hf-internvl": (_tiles, ("internvl",)),
    "hf-llava-onevision": (_anyres, ("llava-onevision",)),
    "hf-llava-next-video": (_anyres, ("llava-next-video",)),
    "hf-smolvlm": (_tiles_of_prompts, ("smolvlm", "idefics3")),
    "hf-vipllava": (_whole, ("vipllava",)),
    "hf-mistral3": (_any_size, ("mistral3",)),
}
"""By adapter: how pictures are made, and tiny models."""


def trials(family: Family) -> Iterable[Trial]:
    """One for each class of a family."""
    see, names = _SEEN[family.name]
    if family.oldest > VERSION:
        return
    for name, claim in zip(names, family.classes, strict=True):
        kind = claim.rpartition(".")[2]
        yield Trial(kind, "transformers", partial(_build, name), partial(_questions, family, see))


def _build(name: str) -> nn.Module:
    return tiny(TINY[name]())


def _questions(family: Family, see: Callable[[Any], Seen], model: nn.Module) -> Questions:
    return _Masked(family, see(model), model).questions()


def pixtral_trial() -> Trial:
    """LLaVA with a Pixtral tower, whose adapter serves other towers too."""
    return Trial(
        "LlavaForConditionalGeneration (Pixtral)",
        "transformers",
        partial(_build, "llava-pixtral"),
        partial(_questions, LLAVA_PIXTRAL, _any_size),
    )


class _Masked:
    """Two prompts, the first about one of three pictures, the second about the other two.

    Args:
        family: whose model it is.
        seen: the pictures.
        model: vanilla.
    """

    def __init__(self, family: Family, seen: Seen, model: Any) -> None:
        self.parts = family.anatomy(model)
        self.seen = seen
        self.model = model
        self.per = ", per='crop'" if family.tiles else ""
        self.states = family.states
        self.inputs = self._collated()

    def questions(self) -> Questions:
        """A cut before the language model, one after a layer of it, and then none."""
        layer = min(LAYER, len(self.parts.layers) - 1)
        if self.states:  # after whose layers nothing can be cut
            keep = min(int((each >= 0).sum()) for each in self.seen.patches) // 2
        else:
            keep = clear_budget(self._seen_by_the_last(layer - 1), self.model.dtype)
        evict = f"evict({keep}{self.per})"
        before = oracle.Cut(0, parse(f"uniform | evict({keep})").strategy)
        after = oracle.Cut(layer, None, keep)
        spread = f"uniform | {evict} @ before-llm(positions='original')"
        inside = f"fastv | {evict} @ after-layer({layer})"
        cuts: tuple[Cut, ...] = (
            Cut("before the LLM", spread, partial(self._by_hand, (before,))),
            Cut(f"after layer {layer}", inside, partial(self._by_hand, (after,))),
            Cut("detached", "", partial(self._by_hand, ())),
        )
        if self.states:
            cuts = (cuts[0], cuts[-1])
        return Questions(lambda: answer(self.model, self.inputs), cuts)

    def _plain(self, cuts: Sequence[oracle.Cut], shift: int = 0) -> oracle.Oracle:
        rows, patches = self._rows(), self.seen.patches
        return oracle.Oracle(self.model, self.parts.llm, rows, patches, cuts, shift=shift)

    def _seen_by_the_last(self, layer: int) -> Iterator[Tensor]:
        """`(tokens,)` of each picture, by which FastV ranks its patches."""
        plain = self._plain(())
        with eager(self.parts.llm):
            plain.expected(self.inputs, 1)
        for (prompts, columns), patches in zip(self._rows(), self.seen.patches, strict=True):
            held = columns[(patches >= 0).to(columns.device)]
            yield plain.seen_by_the_last(layer, int(prompts[0]), held)

    def _by_hand(self, cuts: Sequence[oracle.Cut], text: Tensor, shift: int) -> Tensor:
        with eager(self.parts.llm):  # whose maps are read
            made = self._plain(cuts, shift).logits(self.inputs, text)
        return torch.cat([made[:, :1], made], dim=1)  # prefilled twice, see `answer`

    def _rows(self) -> list[Tensor]:
        """`(2, slots)` prompt and column of each picture's placeholders."""
        slots = self.parts.placeholders(self.inputs["input_ids"], "image").nonzero().T
        return list(torch.split(slots, list(map(len, self.seen.patches)), dim=1))

    def _collated(self) -> Mapping[str, Tensor]:
        """Left padded ids and mask, and the pictures."""
        model = self.model
        placeholder = model.config.image_token_id
        said = iter(words(model, [placeholder, *self.seen.front], 17).tolist())
        pictures = iter(self.seen.patches)

        def text(count: int) -> list[int]:
            return [next(said) for _ in range(count)]

        def picture() -> list[int]:
            return [*self.seen.front, *[placeholder] * len(next(pictures))]

        one = [*text(3), *picture(), *text(4)]
        two = [*text(2), *picture(), *text(3), *picture(), *text(5)]
        both = [torch.tensor(each, device=model.device) for each in (one, two)]
        ids, mask = collated(both, model.generation_config.pad_token_id or 0)
        given = {"input_ids": ids, "attention_mask": mask, **self.seen.arguments}
        if self.seen.front:  # which count time, rows and columns by them
            given["mm_token_type_ids"] = (ids == placeholder).int()
        return given
