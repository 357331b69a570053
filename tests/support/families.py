"""Tiny models of families, with pictures and videos as their processors would hand them over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune_adapters.hf.checks import VERSION
from tokenprune_adapters.hf.contract import FamilyCase
from tokenprune_adapters.hf.families import FAMILIES as SHIPPED
from tokenprune_adapters.hf.families import LLAVA_PIXTRAL
from tokenprune_adapters.hf.family import Family
from tokenprune_adapters.hf.trials.tiny_families import END, IMAGE, START, TINY, VIDEO

SPECIAL = [0, IMAGE, VIDEO, START, END]
"""Token ids that nobody generates."""


@dataclass
class Row:
    """One prompt: ints are text, tuples (kind, seed, *shape) stand for a picture or video."""

    parts: list[Any]


@dataclass
class Tiny:
    """Tiny family.

    Attributes:
        see: from the pictures of all prompts, the arguments of the model, and the slots of each.
        rows: two prompts, the first with two pictures, the second with one, or with a video.
    """

    name: str
    see: Callable[[list[tuple[Any, ...]]], tuple[dict[str, Any], list[int]]]
    rows: list[Row]
    planes: bool = False
    frames: bool = False
    split: Callable[[int], list[int]] | None = None
    patch: Callable[[dict[str, Any]], list[Tensor]] | None = None
    family: Family | None = None
    tolerance: float = 5e-5

    def make(self, attention: str) -> Any:
        """The model, for an attention implementation."""
        return rescaled(TINY[self.name](attention=attention))


TEXT_ALONE = Row([1, 41, 42, 43, 44])


def case_of(tiny: Tiny, per: str = "image") -> FamilyCase:
    """The case of the contract of families; ``per="crop"`` for tiles."""
    name = type(tiny.make("sdpa")).__name__
    claims = (each for each in SHIPPED if any(c.endswith(f".{name}") for c in each.classes))
    family = tiny.family or next(claims)
    parts = [part for row in tiny.rows for part in row.parts if isinstance(part, tuple)]
    whole = zip(parts, tiny.see(parts)[1], strict=True)
    rows: list[tuple[Any, int]] = [
        (part[0], slots)
        for part, count in whole
        for slots in (tiny.split(count) if tiny.split and per == "crop" else [count])
    ]
    return FamilyCase(
        family,
        tiny.make,
        lambda numbers: collate(tiny, [[*tiny.rows, TEXT_ALONE][number] for number in numbers]),
        rows,
        lambda: collate(tiny, [Row([*tiny.rows[0].parts, 31, 32, 33])]),
        patches=None if tiny.patch is None else tiny.patch({}),
        per=per,
        tolerance=tiny.tolerance,
        silent=SPECIAL,
        state=["rope_deltas"] if tiny.planes else [],
    )


def rescaled(model: nn.Module) -> Any:
    """Weights large enough that who is attended to matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                fan = weight[0].numel()
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_(noise * (2.0 if "embed" in name else 1.3) / fan**0.5)
    return model.eval()


def pixels(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def collate(tiny: Tiny, rows: list[Row]) -> dict[str, Any]:
    """Left padded ids and mask, and what the model sees."""
    seen = [part for row in rows for part in row.parts if isinstance(part, tuple)]
    given, counts = tiny.see(seen) if seen else ({}, [])
    left = iter(counts)
    ids = []
    for row in rows:
        tokens: list[int] = []
        for part in row.parts:
            if isinstance(part, tuple):
                kind, slots = IMAGE if part[0] == "image" else VIDEO, next(left)
                # Qwen3-VL tells the time in front of each frame.
                frames = GRIDS[part[2]][0] if tiny.frames and part[0] == "video" else 1
                for frame in range(frames):
                    said = [50 + frame] if frames > 1 else []
                    tokens += [*said, START, *[kind] * (slots // frames)]
            else:
                tokens.append(part)
        ids.append(tokens)
    width = max(map(len, ids))
    made = torch.tensor([[0] * (width - len(each)) + each for each in ids])
    mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in ids])
    given = {"input_ids": made, "attention_mask": mask} | given
    if tiny.planes:
        given["mm_token_type_ids"] = (made == IMAGE).int() + 2 * (made == VIDEO).int()
    return given


# --------------------------------------------------------------------------------------- Qwen

GRIDS = {"small": (1, 4, 8), "large": (1, 8, 8), "video": (2, 4, 8)}


def _qwen_sees(patch: int) -> Any:
    def see(parts: list[tuple[Any, ...]]) -> tuple[dict[str, Any], list[int]]:
        given: dict[str, Any] = {}
        for kind, argument, grid in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            grids = [GRIDS[part[2]] for part in parts if part[0] == kind]
            if grids:
                of = [p for p in parts if p[0] == kind]
                each = [
                    pixels(p[1], t * h * w, 3 * 2 * patch * patch)
                    for p, (t, h, w) in zip(of, grids, strict=True)
                ]
                given[argument], given[grid] = torch.cat(each), torch.tensor(grids)
        counts = [GRIDS[p[2]][0] * GRIDS[p[2]][1] * GRIDS[p[2]][2] // 4 for p in parts]
        return given, counts

    return see


QWEN_ROWS = [
    Row([1, 11, ("image", 1, "small"), 12, 13, ("image", 2, "large"), 14, 15]),
    Row([1, 21, ("video", 3, "video"), 22, 23]),
]


def _pictures(parts: list[tuple[Any, ...]], side: int) -> Tensor:
    return torch.stack([pixels(part[1], 3, side, side) for part in parts])


ANYRES_ROWS = [
    Row([1, 11, ("image", 1, 30, 14), 12, 13, ("image", 2, 16, 16), 14, 15]),
    Row([1, 21, ("video", 3), 22, 23]),
]

TILE_ROWS = [
    Row([1, 11, ("image", 1, 2), 12, 13, ("image", 2, 1), 14, 15]),
    Row([1, 21, ("image", 3, 1), 22, 23]),
]
"""Pictures of some tiles each: (kind, seed, tiles)."""


def _tiles_see(parts: list[tuple[Any, ...]]) -> tuple[dict[str, Any], list[int]]:
    tiles = torch.cat([pixels(seed, count, 3, 32, 32) for _, seed, count in parts])
    return {"pixel_values": tiles}, [16 * count for _, _, count in parts]


def _idefics_sees(parts: list[tuple[Any, ...]]) -> tuple[dict[str, Any], list[int]]:
    """Tiles of each prompt, padded by zeros: here the first prompt has all but the last picture."""
    *first, last = [pixels(seed, count, 3, 32, 32) for _, seed, count in parts]
    rows = [torch.cat(first), last] if first else [last]
    most = max(map(len, rows))
    padded = [torch.cat([row, row.new_zeros(most - len(row), 3, 32, 32)]) for row in rows]
    return {"pixel_values": torch.stack(padded)}, [16 * count for _, _, count in parts]


def _onevision_sees(parts: list[tuple[Any, ...]]) -> tuple[dict[str, Any], list[int]]:
    images = [part for part in parts if part[0] == "image"]
    videos = [part for part in parts if part[0] == "video"]
    given: dict[str, Any] = {}
    if images:
        given["pixel_values"] = torch.stack([pixels(p[1], 3, 3, 16, 16) for p in images])
        given["image_sizes"] = torch.tensor([p[2:] for p in images])
    if videos:
        given["pixel_values_videos"] = torch.stack([pixels(p[1], 3, 3, 16, 16) for p in videos])
    return given, [len(each) for each in _onevision_slots(parts)]


def _onevision_slots(parts: list[tuple[Any, ...]]) -> list[Tensor]:
    """Written out by hand: base view of 16 patches, rows of the tiles with a newline each.

    Of a square picture the middle is left: two columns of each of two tiles.
    """
    found = []
    for part in parts:
        if part[0] == "video":  # 3 frames of 2 x 2, and a newline
            found.append(torch.tensor([*range(12), -1]))
        else:
            tall = [list(range(start, start + 4)) for start in range(16, 48, 4)]
            square = [[18 + r, 19 + r, 32 + r, 33 + r] for r in range(0, 16, 4)]
            slots = list(range(16))
            for row in {(30, 14): tall, (16, 16): square}[part[2:]]:
                slots += [*row, -1]
            found.append(torch.tensor(slots))
    return found


def _onevision_patches(inputs: dict[str, Any]) -> list[Tensor]:
    return _onevision_slots([("image", 1, 30, 14), ("image", 2, 16, 16), ("video", 3)])


def _next_video_sees(parts: list[tuple[Any, ...]]) -> tuple[dict[str, Any], list[int]]:
    given, _ = _onevision_sees(parts)
    return given, [len(each) for each in _next_video_slots(parts)]


def _next_video_slots(parts: list[tuple[Any, ...]]) -> list[Tensor]:
    """Pictures as in LLaVA-OneVision; a video is 3 frames of 2 x 2."""
    return [
        torch.arange(12) if part[0] == "video" else _onevision_slots([part])[0] for part in parts
    ]


def _pixtral_sees(parts: list[tuple[Any, ...]]) -> tuple[dict[str, Any], list[int]]:
    given, _ = _mistral_sees(parts)
    return given, [h * w // 16 for _, _, h, w in parts]


def _mistral_sees(parts: list[tuple[Any, ...]]) -> tuple[dict[str, Any], list[int]]:
    high, wide = (max(part[axis] for part in parts) for axis in (2, 3))
    made = torch.zeros(len(parts), 3, high, wide)
    for number, (_, seed, h, w) in enumerate(parts):
        made[number, :, :h, :w] = pixels(seed, 3, h, w)
    sizes = torch.tensor([part[2:] for part in parts])
    return {"pixel_values": made, "image_sizes": sizes}, [h * w // 64 for _, _, h, w in parts]


def _video_llava_sees(parts: list[tuple[Any, ...]]) -> tuple[dict[str, Any], list[int]]:
    """A video is 3 frames of 16 patches, with [CLS] in front of each."""
    given: dict[str, Any] = {}
    images = [part for part in parts if part[0] == "image"]
    videos = [part for part in parts if part[0] == "video"]
    if images:
        given["pixel_values_images"] = _pictures(images, 16)
    if videos:
        given["pixel_values_videos"] = torch.stack([pixels(p[1], 3, 3, 16, 16) for p in videos])
    return given, [51 if part[0] == "video" else 16 for part in parts]


VIDEO_LLAVA_PATCHES = [
    torch.arange(16),
    torch.arange(16),
    torch.tensor([-1, *range(16), -1, *range(16, 32), -1, *range(32, 48)]),
]

WHOLE_ROWS = [Row([1, 11, ("image", 1), 12, 13, ("image", 2), 14]), Row([1, 21, ("image", 3), 22])]


def _whole_see(parts: list[tuple[Any, ...]]) -> tuple[dict[str, Any], list[int]]:
    return {"pixel_values": _pictures(parts, 16)}, [16] * len(parts)


ALL = [
    Tiny("llava", _whole_see, WHOLE_ROWS),
    Tiny(
        "llava-next",
        _onevision_sees,
        [ANYRES_ROWS[0], Row([1, 21, ("image", 3, 16, 16), 22, 23])],
        patch=lambda inputs: _onevision_slots(
            [("image", 1, 30, 14), ("image", 2, 16, 16), ("image", 3, 16, 16)]
        ),
    ),
    Tiny(
        "video-llava",
        _video_llava_sees,
        [WHOLE_ROWS[0], ANYRES_ROWS[1]],
        patch=lambda inputs: VIDEO_LLAVA_PATCHES,
    ),
    Tiny("qwen2-vl", _qwen_sees(4), QWEN_ROWS, planes=True),
    Tiny("qwen2.5-vl", _qwen_sees(4), QWEN_ROWS, planes=True),
    Tiny("qwen3-vl", _qwen_sees(4), QWEN_ROWS, planes=True, frames=True),
    Tiny("qwen3-vl-moe", _qwen_sees(4), QWEN_ROWS, planes=True, frames=True),
    # Linear attention adds up in chunks: alone and in a batch, the plain models differ by 1e-4.
    *[
        Tiny(name, _qwen_sees(4), QWEN_ROWS, planes=True, frames=True, tolerance=5e-4)
        for name in ("qwen3.5", "qwen3.5-moe")
    ],
    Tiny("internvl", _tiles_see, TILE_ROWS, split=lambda slots: [16] * (slots // 16)),
    Tiny("llava-onevision", _onevision_sees, ANYRES_ROWS, patch=_onevision_patches),
    Tiny(
        "llava-next-video",
        _next_video_sees,
        ANYRES_ROWS,
        patch=lambda inputs: _next_video_slots(
            [("image", 1, 30, 14), ("image", 2, 16, 16), ("video", 3)]
        ),
    ),
    *[
        Tiny(name, _idefics_sees, TILE_ROWS, split=lambda slots: [16] * (slots // 16))
        for name in ("smolvlm", "idefics3")
    ],
    Tiny("vipllava", _whole_see, WHOLE_ROWS),
    Tiny(
        "mistral3",
        _mistral_sees,
        [
            Row([1, 11, ("image", 1, 32, 16), 12, 13, ("image", 2, 24, 32), 14]),
            Row([1, 21, ("image", 3, 16, 16), 22]),
        ],
    ),
    Tiny(
        "llava-pixtral",
        _pixtral_sees,
        [
            Row([1, 11, ("image", 1, 16, 8), 12, 13, ("image", 2, 12, 16), 14]),
            Row([1, 21, ("image", 3, 8, 8), 22]),
        ],
        family=LLAVA_PIXTRAL,
    ),
]

FAMILIES = [each for each in ALL if case_of(each).family.oldest <= VERSION]
"""Those that the transformers that is installed has as described."""
