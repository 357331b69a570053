"""Families that are shipped, each by a few lines of data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenprune.errors import UnsupportedError

from .anatomy import patches_per_crop
from .anyres import Packing, packed_by_grid
from .family import Encoded, Family, Sight, Tower
from .names import Argument, Call
from .outputs import Field, Output


def _hf(*names: str) -> tuple[str, ...]:
    """Full names of classes: module and class in turn."""
    pairs = zip(names[::2], names[1::2], strict=True)
    return tuple(f"transformers.models.{at}.modeling_{at}.{name}" for at, name in pairs)


def _packed(pixels: Argument[Any], grid: Argument[Any]) -> Callable[[Encoded], Tensor]:
    """Pixels of each picture, of patches of all pictures in a row."""

    def pictures(encoded: Encoded) -> Tensor:
        sizes = grid.of(encoded.call).prod(-1).tolist()
        rows = torch.split(pixels.of(encoded.call), sizes)
        return pad_sequence(list(rows), batch_first=True)

    return pictures


def _times(encoded: Encoded) -> Sequence[int] | None:
    """Qwen: steps in time, each of which is a pair of frames; `generate` may not hand them on."""
    grid = encoded.call.video_grid
    return None if grid is None else grid[:, 0].tolist()


def _frames(encoded: Encoded) -> Sequence[int] | None:
    """Frames of each video, where its pixels are there."""
    pixels = encoded.call.videos
    return None if pixels is None else [pixels.shape[1]] * len(pixels)


def _merged(encoded: Encoded) -> Tensor:
    """Qwen2-VL, Qwen3-VL: patches that become a token stand next to each other."""
    unit = encoded.core.visual.spatial_merge_size**2
    return torch.arange(sum(map(len, encoded.elements)) * unit).reshape(-1, unit)


def _merged_by_window(encoded: Encoded) -> Tensor:
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
    return _merged(encoded)[torch.argsort(index).cpu()]


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


def _shuffled(encoded: Encoded) -> Tensor:
    """InternVL: pixel shuffle."""
    config = encoded.core.config
    side = config.vision_config.image_size[0] // config.vision_config.patch_size[0]
    return squares(side, round(1 / config.downsample_ratio), len(encoded.elements))


def _connected(encoded: Encoded) -> Tensor:
    """SmolVLM, Idefics3: pixel shuffle of each tile."""
    vision, core = encoded.core.config.vision_config, encoded.core
    mask = encoded.call.pixel_mask
    if mask is not None and bool((mask.flatten(2).any(2) != mask.flatten(2).all(2)).any()):
        raise UnsupportedError(
            "attention of tiles with padded pixels is not read; let the image processor split or "
            "resize pictures to whole tiles, or rank by features (diverse, similarity) or fastv"
        )
    side = vision.image_size // vision.patch_size
    return squares(side, core.connector.scale_factor, len(_tiles(encoded)))


def _one_by_one(encoded: Encoded) -> Tensor:
    """Every patch is a token."""
    return torch.arange(sum(map(len, encoded.elements)))[:, None]


def _tiles(encoded: Encoded) -> Sequence[int]:
    """SmolVLM, Idefics3: an element is a prompt, which holds tiles."""
    size = encoded.core.image_seq_len
    return [size] * (sum(map(len, encoded.elements)) // size)


def _tile_pixels(encoded: Encoded) -> Tensor:
    """SmolVLM, Idefics3: prompts with fewer tiles than others have tiles of zeros."""
    pixels = encoded.call.pixels.flatten(0, 1)
    return pixels[pixels.flatten(1).any(1)]


def _packed_crops(encoded: Encoded) -> Packing:
    """LLaVA-NeXT-Video: base view, and rows of tiles that end in newlines."""
    core = encoded.core
    return Packing.of(core, _sizes(encoded), patches_per_crop(core.config))


def _packed_grid(encoded: Encoded) -> Packing:
    """LLaVA-OneVision: tiles may shrink, and one of several pictures of a prompt has none."""
    core, counts = encoded.core, encoded.call.pictures_of_prompts
    sizes = _sizes(encoded)
    pictures = [1] * len(sizes) if counts is None else counts.tolist()
    whole = [count > 1 for count in pictures for _ in range(count)]
    return packed_by_grid(core, sizes, whole, _side(core), encoded.call.aspect)


def _side(core: Any) -> int:
    """Patches a side of a crop."""
    return math.isqrt(patches_per_crop(core.config))


def _unpacked(packing: Packing) -> Tensor:
    """`(slots, 1)`: the patch that each slot of packed pictures is; any, for a newline."""
    return torch.cat(packing.sources).clamp(min=0)[:, None]


def _pooled_by_halves(encoded: Encoded) -> Tensor:
    """LLaVA-OneVision: frames have half their sides, each token is of up to four patches."""
    if encoded.call.videos is None:
        return _unpacked(_packed_grid(encoded))
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


def _pooled_by_squares(encoded: Encoded) -> Tensor:
    """LLaVA-NeXT-Video: squares of each frame are pooled."""
    if encoded.call.videos is None:
        return _unpacked(_packed_crops(encoded))
    side, stride = _side(encoded.core), encoded.core.config.spatial_pool_stride
    frames = sum(map(len, encoded.elements)) // (side // stride) ** 2
    return squares(side, stride, frames)


def _sizes(encoded: Encoded) -> Tensor:
    return torch.as_tensor(encoded.call.sizes, device="cpu")


def _grids(core: Any, call: Call) -> list[tuple[int, int]]:
    """Pixtral: patches in height and width of each picture."""
    patch = core.config.vision_config.patch_size
    sizes = torch.as_tensor(call.sizes, device="cpu").tolist()
    return [(high // patch, wide // patch) for high, wide in sizes]


def _areas(core: Any, call: Call) -> list[int]:
    """Pixtral: patches of each picture."""
    return [high * wide for high, wide in _grids(core, call)]


def _merged_of_any_size(encoded: Encoded) -> Tensor:
    """Mistral3: squares of patches of each picture."""
    factor, first, made = encoded.core.config.spatial_merge_size, 0, []
    for high, wide in _grids(encoded.core, encoded.call):
        made.append(first + _squares_of(high, wide, factor))
        first += high * wide
    return torch.cat(made)


def _pixtral_tower(members: Callable[[Encoded], Tensor]) -> Tower:
    return Tower(
        ("vision_tower.transformer.layers",),
        members,
        attention="attention",
        packed=_areas,
        kinds=("pixtral",),
    )


def _crop(encoded: Encoded) -> int:
    return patches_per_crop(encoded.core.config)


def _last_newline(encoded: Encoded) -> Sequence[Tensor]:
    """LLaVA-OneVision: one newline behind all frames of a video."""
    (slots,) = {len(each) for each in encoded.elements}
    patches = torch.arange(slots)
    return [patches.masked_fill(patches == slots - 1, -1) for _ in encoded.elements]


IMAGES = Sight("image", "get_image_features", Call.pictures)
"""Pictures that come as elements of the features, one for each row of pixels."""


def _anyres(packed: Callable[[Encoded], Packing]) -> Sight:
    """Pictures with a base view and tiles, packed by their sizes."""
    return replace(
        IMAGES, needs=(Call.sizes,), patches=lambda encoded: packed(encoded).patches, crop=_crop
    )


_LAYERS = ("vision_tower.encoder.layers", "vision_tower.vision_model.encoder.layers")
"""Where CLIP and SigLIP keep their blocks, in newer and older releases."""


def _qwen(also: tuple[Field[Any], ...] = ()) -> tuple[Sight, Sight]:
    """Pictures and videos whose patches come in a row, with a grid of time, height and width."""
    images = Sight(
        "image",
        "get_image_features",
        Call.pictures,
        (Call.image_grid,),
        pictures=_packed(Call.pictures, Call.image_grid),
        also=also,
    )
    videos = replace(
        images,
        kind="video",
        encode="get_video_features",
        pixels=Call.videos,
        needs=(Call.video_grid,),
        pictures=_packed(Call.videos, Call.video_grid),
        frames=_times,
    )
    return images, videos


def _qwen_tower(members: Any) -> Tower:
    return Tower(("visual.blocks",), members, attention="attn", fused="qkv")


PIXTRAL = "PixtralVisionModel"
"""Class of the tower with which a LLaVA model is a family of its own."""

LLAVA_PIXTRAL = Family(
    "hf-llava",
    "LLaVA of transformers with a Pixtral tower",
    (),
    (IMAGES,),
    tower=_pixtral_tower(_one_by_one),
)

FAMILIES = (
    Family(
        "hf-qwen2-vl",
        "Qwen2-VL of transformers (pictures and videos)",
        _hf("qwen2_vl", "Qwen2VLForConditionalGeneration"),
        _qwen(),
        towers=("visual",),
        tower=_qwen_tower(_merged),
        planes="time, row and column",
    ),
    Family(
        "hf-qwen2-5-vl",
        "Qwen2.5-VL of transformers (pictures and videos)",
        _hf("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
        _qwen(),
        towers=("visual",),
        tower=_qwen_tower(_merged_by_window),
        planes="time, row and column",
    ),
    Family(
        "hf-qwen3-vl",
        "Qwen3-VL of transformers, dense and MoE (pictures and videos)",
        _hf(
            "qwen3_vl",
            "Qwen3VLForConditionalGeneration",
            "qwen3_vl_moe",
            "Qwen3VLMoeForConditionalGeneration",
        ),
        _qwen((Output.deepstack,)),
        towers=("visual",),
        tower=_qwen_tower(_merged),
        planes="time, row and column",
    ),
    Family(
        "hf-internvl",
        "InternVL of transformers; a tile is a row",
        _hf("internvl", "InternVLForConditionalGeneration"),
        (IMAGES,),
        tower=Tower(
            ("vision_tower.encoder.layer",),
            _shuffled,
            attention="attention",
            query="q_norm",
            key="k_norm",
            prefix=1,
        ),
        tiles=True,
    ),
    Family(
        "hf-llava-onevision",
        "LLaVA-OneVision of transformers (pictures of any resolution, and videos)",
        _hf("llava_onevision", "LlavaOnevisionForConditionalGeneration"),
        (
            _anyres(_packed_grid),
            Sight(
                "video",
                "get_video_features",
                Call.videos,
                patches=_last_newline,
                frames=_frames,
            ),
        ),
        tower=Tower(_LAYERS, _pooled_by_halves, kinds=("siglip_vision_model",)),
    ),
    Family(
        "hf-llava-next-video",
        "LLaVA-NeXT-Video of transformers (pictures of any resolution, and videos)",
        _hf("llava_next_video", "LlavaNextVideoForConditionalGeneration"),
        (
            _anyres(_packed_crops),
            Sight("video", "get_video_features", Call.videos, frames=_frames),
        ),
        tower=Tower(_LAYERS, _pooled_by_squares, prefix=1, layer=-2, kinds=("clip_vision_model",)),
        oldest=(5, 24),
    ),
    Family(
        "hf-smolvlm",
        "SmolVLM and Idefics3 of transformers; a tile is a row",
        _hf(
            "smolvlm",
            "SmolVLMForConditionalGeneration",
            "idefics3",
            "Idefics3ForConditionalGeneration",
        ),
        (
            Sight(
                "image",
                "get_image_features",
                Call.pictures,
                rows=_tiles,
                pictures=_tile_pixels,
            ),
        ),
        llm="text_model",
        towers=("vision_model",),
        tower=Tower(("vision_model.encoder.layers",), _connected),
        tiles=True,
    ),
    Family(
        "hf-vipllava",
        "VipLlava of transformers",
        _hf("vipllava", "VipLlavaForConditionalGeneration"),
        (IMAGES,),
        tower=Tower(
            _LAYERS,
            _one_by_one,
            prefix=1,
            layer=-2,
            kinds=("clip_vision_model",),
        ),
    ),
    Family(
        "hf-mistral3",
        "Mistral3 of transformers, with a Pixtral tower",
        _hf("mistral3", "Mistral3ForConditionalGeneration"),
        (IMAGES,),
        tower=_pixtral_tower(_merged_of_any_size),
    ),
)
