"""A tiny random Video-LLaVA, prompts of pictures and videos, and an oracle by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from .llava import BOS, EOS, IMAGE, PAD, picture, scale

VIDEO = 98
PATCHES = 16
FRAMES = 3

Kept: TypeAlias = Sequence[Sequence[int]]
"""Of each picture and video of a prompt, in order: patches (of a video: frame * 16 + patch)."""


def tiny_video_llava(
    attention: str = "sdpa",
    seed: int = 4,
    tower: str = "clip",
    feature_layer: int | list[int] = -2,
    select: str = "default",
    layers: tuple[int, int] = (5, 3),
) -> VideoLlavaForConditionalGeneration:
    """The two towers have different weights, so that it shows when they are mixed up."""
    kind = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[tower]
    vision = kind(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers[0],
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    text = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers[1],
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        max_position_embeddings=1024,
    )
    config = VideoLlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=select,
        attn_implementation=attention,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VideoLlavaForConditionalGeneration(config).eval()
    scale(model, torch.Generator().manual_seed(seed))
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    return model


def video(seed: int, frames: int = FRAMES) -> Tensor:
    """`(frames, 3, 32, 32)`."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(frames, 3, 32, 32, generator=generator)


@dataclass
class Row:
    """One prompt: ints are text, 3-D tensors are pictures, 4-D tensors are videos."""

    parts: list[int | Tensor]
    cls: int = 1  # tokens of a frame that are no patches

    @property
    def visual(self) -> list[Tensor]:
        return [part for part in self.parts if isinstance(part, Tensor)]

    @property
    def ids(self) -> list[int]:
        ids: list[int] = []
        for part in self.parts:
            if not isinstance(part, Tensor):
                ids.append(part)
            elif part.ndim == 3:
                ids += [IMAGE] * PATCHES
            else:
                ids += [VIDEO] * (len(part) * (PATCHES + self.cls))
        return ids


def prompts() -> list[Row]:
    """A picture; two videos, next to each other; text only; a video and pictures, mixed."""
    return [
        Row([BOS, 11, 12, picture(1), 13, 14, 15]),
        Row([BOS, 21, video(1), video(2), 22, 23, 24, 25]),
        Row([BOS, 31, 32, 33, 34]),
        Row([BOS, picture(2), 41, 42, video(3), 43, picture(3), 44, 45]),
    ]


def collate(batch: list[Row]) -> dict[str, Tensor]:
    """What a processor makes of the prompts: left padding."""
    width = max(len(row.ids) for row in batch)
    pads = [width - len(row.ids) for row in batch]
    made = {
        "input_ids": torch.tensor([[PAD] * p + b.ids for p, b in zip(pads, batch, strict=True)]),
        "attention_mask": torch.tensor(
            [[0] * p + [1] * len(b.ids) for p, b in zip(pads, batch, strict=True)]
        ),
    }
    visual = [part for row in batch for part in row.visual]
    pictures = [part for part in visual if part.ndim == 3]
    videos = [part for part in visual if part.ndim == 4]
    if pictures:
        made["pixel_values_images"] = torch.stack(pictures)
    if videos:
        made["pixel_values_videos"] = torch.stack(videos)
    return made


@torch.no_grad()
def cls_scores(model: Any, part: Tensor, layers: int = 1) -> Tensor:
    """`(frames, patches)` head mean of the [CLS] rows, from full maps of eager attention."""
    tower = model.model.image_tower if part.ndim == 3 else model.model.video_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    pixels = part[None] if part.ndim == 3 else part
    maps = tower(pixel_values=pixels, output_attentions=True).attentions
    tower.set_attn_implementation(before)
    # Hidden state -2 comes out of block -2.
    rows = torch.stack([each[:, :, 0, 1:].mean(1) for each in maps[-1 - layers : -1]])
    return rows.mean(0)


def kept(model: Any, part: Tensor, keep: int, per: str = "image", layers: int = 1) -> list[int]:
    """What stays by [CLS] attention, counted over all frames: best first, then lowest index."""
    scores = cls_scores(model, part, layers)
    groups = [scores.flatten()] if per == "image" else list(scores)
    best, start = [], 0
    for group in groups:
        row = group.tolist()
        order = sorted(range(len(row)), key=lambda n: (-row[n], n))[:keep]
        best += sorted(start + n for n in order)
        start += len(row)
    return best


@torch.no_grad()
def frame_states(model: Any, part: Tensor) -> tuple[Tensor, Tensor]:
    """`(frames, cls, channels)` and `(frames, patches, channels)` that the projector may get."""
    core = model.model
    tower = core.image_tower if part.ndim == 3 else core.video_tower
    states = tower(
        pixel_values=part[None] if part.ndim == 3 else part, output_hidden_states=True
    ).hidden_states
    configured = model.config.vision_feature_layer
    numbers = configured if isinstance(configured, list) else [configured]
    features = torch.cat([states[number] for number in numbers], dim=-1)
    cls = features.shape[1] - PATCHES
    return features[:, :cls], features[:, cls:]


@torch.no_grad()
def embeddings(
    model: Any, row: Row, chosen: Kept, positions: str = "reindexed"
) -> tuple[Tensor, Tensor]:
    """`(1, tokens, channels)` of one prompt with kept tokens only, and their positions.

    A video is, frame by frame, [CLS] and then the patches.
    """
    core = model.model
    embed = core.get_input_embeddings()
    pieces, places, place = [], [], 0
    which = iter(chosen)
    for part in row.parts:
        if not isinstance(part, Tensor):
            pieces.append(embed(torch.tensor([part])))
            places.append(place)
            place += 1
            continue
        stay = set(next(which))
        every_cls, every_patch = frame_states(model, part)
        for frame, (cls, patches) in enumerate(zip(every_cls, every_patch, strict=True)):
            shown = [] if part.ndim == 3 else list(cls)
            places += range(place, place + len(shown))
            place += len(shown)
            for n, patch in enumerate(patches):
                if frame * PATCHES + n in stay:
                    shown.append(patch)
                    places.append(place)
                place += 1
            if shown:
                pieces.append(core.multi_modal_projector(torch.stack(shown)))
    embeds = torch.cat(pieces)[None]
    if positions == "reindexed":
        places = list(range(embeds.shape[1]))
    return embeds, torch.tensor([places])


@torch.no_grad()
def greedy(
    model: Any, row: Row, chosen: Kept, steps: int, positions: str = "reindexed"
) -> tuple[list[int], Tensor]:
    """Greedy text of one prompt and its logits, recomputed from scratch for every token."""
    embeds, places = embeddings(model, row, chosen, positions)
    place = len(row.ids) if positions == "original" else embeds.shape[1]
    text, logits = [], []
    for _ in range(steps):
        length = embeds.shape[1]
        visible = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        if model.model.language_model.config._attn_implementation == "eager":
            visible = torch.zeros(visible.shape).masked_fill(~visible, -1e30)
        hidden = model.model.language_model(
            inputs_embeds=embeds, position_ids=places, attention_mask=visible, use_cache=False
        ).last_hidden_state
        logits.append(model.lm_head(hidden[0, -1]))
        text.append(int(logits[-1].argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([text[-1:]]))], 1)
        places = torch.cat([places, torch.tensor([[place]])], 1)
        place += 1
    return text, torch.stack(logits)


def greedy_batch(
    model: Any,
    batch: list[Row],
    keep: int,
    steps: int = 5,
    per: str = "image",
    positions: str = "reindexed",
    layers: int = 1,
) -> tuple[Tensor, Tensor]:
    """`(rows, steps)` text and `(rows, steps, vocabulary)` logits, row by row."""
    each = [
        greedy(
            model,
            row,
            [kept(model, part, keep, per, layers) for part in row.visual],
            steps,
            positions,
        )
        for row in batch
    ]
    return torch.tensor([text for text, _ in each]), torch.stack([logits for _, logits in each])
