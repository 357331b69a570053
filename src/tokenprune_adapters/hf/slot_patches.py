"""Which patch of which picture each slot of a family's features is made of.

Functions for the fields of `Sight` and `Tower`; `families.py` says which family has which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenprune.errors import UnsupportedError

from .anatomy import patches_per_crop, select_strategy
from .anyres import Packing, packed_by_grid
from .family import Encoded, Run
from .names import Argument, Call


def pictures_in_a_row(pixels: Argument[Any], grid: Argument[Any]) -> Callable[[Encoded], Tensor]:
    """Pixels of each picture, of patches of all pictures in a row."""

    def pictures(encoded: Encoded) -> Tensor:
        sizes = grid.of(encoded.call).prod(-1).tolist()
        rows = torch.split(pixels.of(encoded.call), sizes)
        return pad_sequence(list(rows), batch_first=True)

    return pictures


def qwen_times(encoded: Encoded) -> Sequence[int] | None:
    """Qwen: steps in time, each of which is a pair of frames; `generate` may not hand them on."""
    grid = encoded.call.video_grid
    return None if grid is None else grid[:, 0].tolist()


def frames_of_pixels(encoded: Encoded) -> Sequence[int] | None:
    """Frames of each video, where its pixels are there."""
    pixels = encoded.call.videos
    return None if pixels is None else [pixels.shape[1]] * len(pixels)


def merged_in_a_row(encoded: Encoded) -> Tensor:
    """Qwen2-VL, Qwen3-VL: patches that become a token stand next to each other."""
    unit = encoded.core.visual.spatial_merge_size**2
    return torch.arange(sum(map(len, encoded.elements)) * unit).reshape(-1, unit)


def merged_by_window(encoded: Encoded) -> Tensor:
    """Qwen2.5-VL: blocks work in the order of windows, tokens come out in that of rows."""
    from transformers.vision_utils import get_vision_window_index

    tower, given = encoded.core.visual, encoded.call
    named = given.kwargs.keys() & {*Call.image_grid.names}
    index, _ = get_vision_window_index(
        given.image_grid if named else given.video_grid,
        spatial_merge_size=tower.spatial_merge_size,
        window_size=tower.window_size,
        patch_size=tower.patch_size,
    )
    return merged_in_a_row(encoded)[torch.argsort(index).cpu()]


def squares(side: int, factor: int, pictures: int) -> Tensor:
    """`(tokens, members)`: the patches that squares of `factor` by `factor` are made of.

    What is left over at the end of rows and columns belongs to none.

    >>> squares(4, 2, 1)[0]
    tensor([0, 1, 4, 5])
    """
    one = _squares_of(side, side, factor)
    return torch.cat([one + number * side * side for number in range(pictures)])


def _squares_of(high: int, wide: int, factor: int) -> Tensor:
    """As `squares`, of one picture with `high` rows of `wide` patches."""
    down, across = high // factor, wide // factor
    grid = torch.arange(high * wide).reshape(high, wide)[: down * factor, : across * factor]
    grid = grid.reshape(down, factor, across, factor)
    return grid.permute(0, 2, 1, 3).reshape(-1, factor * factor)


def shuffled(encoded: Encoded) -> Tensor:
    """InternVL: pixel shuffle."""
    config = encoded.core.config
    side = config.vision_config.image_size[0] // config.vision_config.patch_size[0]
    return squares(side, round(1 / config.downsample_ratio), len(encoded.elements))


def connected(encoded: Encoded) -> Tensor:
    """SmolVLM, Idefics3: pixel shuffle of each tile."""
    vision, core = encoded.core.config.vision_config, encoded.core
    mask = encoded.call.pixel_mask
    if mask is not None and bool((mask.flatten(2).any(2) != mask.flatten(2).all(2)).any()):
        raise UnsupportedError(
            "attention of tiles with padded pixels is not read; let the image processor split or "
            "resize pictures to whole tiles, or rank by features (diverse, similarity) or fastv"
        )
    side = vision.image_size // vision.patch_size
    return squares(side, core.connector.scale_factor, len(tiles_of_prompts(encoded)))


def one_by_one(encoded: Encoded) -> Tensor:
    """Every patch is a token."""
    return torch.arange(sum(map(len, encoded.elements)))[:, None]


def tiles_of_prompts(encoded: Encoded) -> Sequence[int]:
    """SmolVLM, Idefics3: an element is a prompt, which holds tiles."""
    size = encoded.core.image_seq_len
    return [size] * (sum(map(len, encoded.elements)) // size)


def pixels_of_tiles(encoded: Encoded) -> Tensor:
    """SmolVLM, Idefics3: prompts with fewer tiles than others have tiles of zeros."""
    pixels: Tensor = encoded.call.pixels.flatten(0, 1)
    return pixels[pixels.flatten(1).any(1)]


def by_run(runs: Sequence[Run], tile: int) -> list[int]:
    """InternVL: the tiles of a picture stand next to each other.

    >>> by_run([Run(32, before=7), Run(16, before=7)], 16)
    [2, 1]
    """
    return [run.tokens // tile for run in runs]


def by_global_view(runs: Sequence[Run], tile: int) -> list[int]:
    """SmolVLM, Idefics3: a picture ends with its global view, as does the last one of a prompt.

    What stands in front of one tells it from other tiles, which have their row and column there.

    >>> by_global_view([Run(16, before=5), Run(16, before=6), Run(16, before=7)] * 2, 16)
    [3, 3]
    """
    made, tiles = [], 0
    for run in runs:
        tiles += run.tokens // tile
        if run.before == runs[-1].before:
            made.append(tiles)
            tiles = 0
    return made


def packed_crops(encoded: Encoded) -> Packing | None:
    """LLaVA-NeXT, -NeXT-Video: base view, and rows of tiles that end in newlines."""
    core = encoded.core
    if encoded.call.sizes is None:  # `generate` does not hand them on
        return None
    return Packing.of(core, _sizes(encoded.call), patches_per_crop(core.config))


def packed_grid(encoded: Encoded) -> Packing | None:
    """LLaVA-OneVision: tiles may shrink, and one of several pictures of a prompt has none."""
    core, counts = encoded.core, encoded.call.pictures_of_prompts
    if encoded.call.sizes is None:
        return None
    sizes = _sizes(encoded.call)
    pictures = [1] * len(sizes) if counts is None else counts.tolist()
    whole = [count > 1 for count in pictures for _ in range(count)]
    return packed_by_grid(core, sizes, whole, _side(core), encoded.call.aspect)


def _side(core: Any) -> int:
    """Patches a side of a crop."""
    return math.isqrt(patches_per_crop(core.config))


def _unpacked(packing: Packing | None) -> Tensor:
    """`(slots, 1)`: the patch that each slot of packed pictures is; any, for a newline."""
    assert packing is not None  # the call is the one that encodes
    return torch.cat(packing.sources).clamp(min=0)[:, None]


def pooled_by_halves(encoded: Encoded) -> Tensor:
    """LLaVA-OneVision: frames have half their sides, each token is of up to four patches."""
    if encoded.call.videos is None:
        return _unpacked(encoded.once(packed_grid))
    side = _side(encoded.core)
    middle = (torch.arange(-(-side // 2)) + 0.5) * side / -(-side // 2) - 0.5
    near = torch.stack([middle.floor(), middle.ceil()], dim=1).long()  # of each row and column
    cells = near[:, None, :, None] * side + near[None, :, None, :]
    one, last = cells.reshape(-1, 4), torch.zeros(1, 4, dtype=torch.int64)
    made, start = [], 0
    for element in encoded.elements:
        frames = (len(element) - 1) // len(one)
        patches = torch.arange(start, start + frames)[:, None, None] * side * side
        made += [(patches + one).flatten(0, 1), last]  # a newline is behind
        start += frames
    return torch.cat(made)


def pooled_by_squares(encoded: Encoded) -> Tensor:
    """LLaVA-NeXT-Video: squares of each frame are pooled."""
    if encoded.call.videos is None:
        return _unpacked(encoded.once(packed_crops))
    side, stride = _side(encoded.core), encoded.core.config.spatial_pool_stride
    frames = sum(map(len, encoded.elements)) // (side // stride) ** 2
    return squares(side, stride, frames)


def _sizes(call: Call) -> Tensor:
    """`(pictures, 2)` height and width."""
    return torch.as_tensor(call.sizes, device="cpu")


def _grids(core: Any, call: Call) -> list[tuple[int, int]]:
    """Pixtral: patches in height and width of each picture."""
    patch = core.config.vision_config.patch_size
    return [(high // patch, wide // patch) for high, wide in _sizes(call).tolist()]


def patches_in_a_row(core: Any, call: Call) -> list[int]:
    """Pixtral: patches of each picture."""
    return [high * wide for high, wide in _grids(core, call)]


def merged_of_any_size(encoded: Encoded) -> Tensor:
    """Mistral3: squares of patches of each picture."""
    factor, first, made = encoded.core.config.spatial_merge_size, 0, []
    for high, wide in _grids(encoded.core, encoded.call):
        made.append(first + _squares_of(high, wide, factor))
        first += high * wide
    return torch.cat(made)


def crop_of(encoded: Encoded) -> int:
    """Patches of a crop."""
    return patches_per_crop(encoded.core.config)


def cls_of_frames(core: Any) -> int:
    """Video-LLaVA: the projector gets [CLS] of each frame, where it does not of pictures."""
    return 1 if select_strategy(core.config) == "default" else 0


def frames_of_elements(encoded: Encoded) -> Sequence[int]:
    """Video-LLaVA: an element is a frame, of all videos of a call."""
    if encoded.call.videos is not None:
        return [encoded.call.videos.shape[1]] * len(encoded.call.videos)
    if encoded.noted is not None:
        frames = encoded.noted[0]  # videos of a call are alike
    elif encoded.per == "frame":
        frames = 1  # nobody wants to know
    else:
        raise UnsupportedError(
            "it is not known how many frames the encoded videos have: they did not come from the "
            "attached model's own get_video_features; pass pixel_values_videos, or per='frame'"
        )
    return [frames] * (len(encoded.elements) // frames)


def frames_beside_cls(encoded: Encoded) -> Sequence[Tensor]:
    """Video-LLaVA: the patches of each frame, and [CLS] in front of them."""
    size = crop_of(encoded)
    one = torch.arange(-cls_of_frames(encoded.core), size, device="cpu")
    return [
        torch.where(one < 0, -1, one + torch.arange(frames, device="cpu")[:, None] * size).flatten()
        for frames in encoded.once(frames_of_elements)
    ]


def last_newline(encoded: Encoded) -> Sequence[Tensor]:
    """LLaVA-OneVision: one newline behind all frames of a video."""
    (slots,) = {len(each) for each in encoded.elements}
    patches = torch.arange(slots)
    return [patches.masked_fill(patches == slots - 1, -1) for _ in encoded.elements]
