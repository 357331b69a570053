"""Tiny models of families, with pictures and videos as their processors would hand them over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

IMAGE, VIDEO, START = 90, 91, 92
"""Token ids: placeholders of pictures and videos, and what stands in front of either."""

SPECIAL = [0, IMAGE, VIDEO, START, 93]
"""Token ids that nobody generates."""

TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


@dataclass
class Row:
    """One prompt: ints are text, tuples (kind, seed, *shape) stand for a picture or video."""

    parts: list[Any]


@dataclass
class Tiny:
    """Tiny family.

    Attributes:
        make: builds the model for an attention implementation.
        see: from the pictures of all prompts, the arguments of the model, and the slots of each.
        rows: two prompts, the first with two pictures, the second with one, or with a video.
        signals: scorers of the tower that the family offers.
    """

    name: str
    make: Callable[[str], Any]
    see: Callable[[list[tuple[Any, ...]]], tuple[dict[str, Any], list[int]]]
    rows: list[Row]
    signals: list[str] = field(default_factory=list)
    planes: bool = False
    frames: bool = False
    split: Callable[[int], list[int]] | None = None
    patch: Callable[[dict[str, Any]], list[Tensor]] | None = None


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
    given, counts = tiny.see(seen)
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


def _qwen(config: str, model: str, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    def make(attention: str) -> Any:
        torch.manual_seed(0)
        made = getattr(transformers, config)(
            text_config=TEXT | text,
            vision_config={"depth": 4, "patch_size": 4, "in_channels": 3} | vision,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=START,
            vision_end_token_id=93,
            attn_implementation=attention,
        )
        return rescaled(getattr(transformers, model)(made))

    return make


MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
QWEN_ROWS = [
    Row([1, 11, ("image", 1, "small"), 12, 13, ("image", 2, "large"), 14, 15]),
    Row([1, 21, ("video", 3, "video"), 22, 23]),
]
GIVEN = ["received-attention", "fopru"]

FAMILIES = [
    Tiny(
        "qwen2-vl",
        _qwen(
            "Qwen2VLConfig",
            "Qwen2VLForConditionalGeneration",
            MROPE,
            {"embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        ),
        _qwen_sees(4),
        QWEN_ROWS,
        GIVEN,
        planes=True,
    ),
    Tiny(
        "qwen2.5-vl",
        _qwen(
            "Qwen2_5_VLConfig",
            "Qwen2_5_VLForConditionalGeneration",
            MROPE,
            {
                "hidden_size": 32,
                "out_hidden_size": 32,
                "num_heads": 2,
                "intermediate_size": 48,
                "window_size": 16,
                "fullatt_block_indexes": [1, 3],
            },
        ),
        _qwen_sees(4),
        QWEN_ROWS,
        GIVEN,
        planes=True,
    ),
    Tiny(
        "qwen3-vl",
        _qwen(
            "Qwen3VLConfig",
            "Qwen3VLForConditionalGeneration",
            MROPE | {"head_dim": 8},
            {
                "hidden_size": 32,
                "out_hidden_size": 32,
                "num_heads": 2,
                "intermediate_size": 48,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0, 2],
            },
        ),
        _qwen_sees(4),
        QWEN_ROWS,
        GIVEN,
        planes=True,
        frames=True,
    ),
]
