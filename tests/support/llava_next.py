"""A tiny random LLaVA-NeXT, pictures of many shapes, and an oracle that packs them by hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.models.llava_next.modeling_llava_next import select_best_resolution

from .llava import BOS, EOS, IMAGE, PAD, scale

SIDE, PATCH, GRID = 32, 8, 4
PATCHES = GRID * GRID
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]

SIZES = [(60, 60), (40, 90), (90, 40), (20, 25), (17, 300), (300, 17), (64, 48)]
"""Height and width: square, wide, tall, smaller than a crop, and extreme."""


def tiny_llava_next(attention: str = "sdpa", seed: int = 0) -> LlavaNextForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        max_position_embeddings=1024,
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        attn_implementation=attention,
    )
    model = LlavaNextForConditionalGeneration(config).eval()
    scale(model, torch.Generator().manual_seed(seed))
    model.model.image_newline.data.normal_(generator=torch.Generator().manual_seed(seed))
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    return model


@dataclass
class Picture:
    """Crops `(1 + tiles, 3, side, side)` of a picture of `size` (height, width)."""

    size: tuple[int, int]
    crops: Tensor

    @classmethod
    def of(cls, size: tuple[int, int], seed: int) -> Picture:
        height, width = select_best_resolution(size, PINPOINTS)
        tiles = (height // SIDE) * (width // SIDE)
        generator = torch.Generator().manual_seed(seed)
        return cls(size, torch.randn(1 + tiles, 3, SIDE, SIDE, generator=generator))

    @property
    def packed(self) -> list[tuple[int, int] | None]:
        """(crop, patch) of every packed token, None for a newline: base view, then the raster.

        Written out from the description of LLaVA-NeXT: tiles form one large grid, of which the
        rows or columns that padding fills are cut off, and every row ends with a newline.
        """
        height, width = (side // SIDE for side in select_best_resolution(self.size, PINPOINTS))
        rows, columns = range(height * GRID), range(width * GRID)
        tall, wide = self.size
        if wide / tall > len(columns) / len(rows):
            pad = (len(rows) - int(round(tall * (len(columns) / wide), 7))) // 2
            rows = rows[pad : len(rows) - pad]
        else:
            pad = (len(columns) - int(round(wide * (len(rows) / tall), 7))) // 2
            columns = columns[pad : len(columns) - pad]
        tokens: list[tuple[int, int] | None] = [(0, patch) for patch in range(PATCHES)]
        for row in rows:
            for column in columns:
                tile = (row // GRID) * width + column // GRID
                tokens.append((1 + tile, (row % GRID) * GRID + column % GRID))
            tokens.append(None)
        return tokens


@dataclass
class Prompt:
    parts: list[int | Picture]

    @property
    def pictures(self) -> list[Picture]:
        return [part for part in self.parts if isinstance(part, Picture)]

    @property
    def ids(self) -> list[int]:
        return [
            token
            for part in self.parts
            for token in ([IMAGE] * len(part.packed) if isinstance(part, Picture) else [part])
        ]


def prompts() -> list[Prompt]:
    """One wide picture; a tall and a small one; text only."""
    return [
        Prompt([BOS, 11, Picture.of((40, 90), 1), 12, 13, 14]),
        Prompt([BOS, Picture.of((90, 40), 2), 21, 22, Picture.of((20, 25), 3), 23, 24]),
        Prompt([BOS, 31, 32, 33]),
    ]


def collate(batch: list[Prompt]) -> dict[str, Tensor]:
    """Left padding; crops padded to the picture with the most."""
    width = max(len(prompt.ids) for prompt in batch)
    pads = [width - len(prompt.ids) for prompt in batch]
    made = {
        "input_ids": torch.tensor([[PAD] * p + b.ids for p, b in zip(pads, batch, strict=True)]),
        "attention_mask": torch.tensor(
            [[0] * p + [1] * len(b.ids) for p, b in zip(pads, batch, strict=True)]
        ),
    }
    pictures = [picture for prompt in batch for picture in prompt.pictures]
    if pictures:
        most = max(len(picture.crops) for picture in pictures)
        made["pixel_values"] = torch.stack(
            [
                torch.cat([p.crops, p.crops.new_zeros(most - len(p.crops), 3, SIDE, SIDE)])
                for p in pictures
            ]
        )
        made["image_sizes"] = torch.tensor([picture.size for picture in pictures])
    return made


@torch.no_grad()
def tower_scores(model: LlavaNextForConditionalGeneration, picture: Picture) -> Tensor:
    """`(crops, patches)` [CLS] attention of the layer that gives the features, head mean."""
    tower = model.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    maps = tower(pixel_values=picture.crops, output_attentions=True).attentions[-2]
    tower.set_attn_implementation(before)
    return maps[:, :, 0, 1:].mean(1)


@torch.no_grad()
def kept(
    model: LlavaNextForConditionalGeneration, picture: Picture, keep: int, per: str
) -> set[tuple[int, int]]:
    """(crop, patch) of what stays, by [CLS] attention of the layer that gives the features."""
    scores = tower_scores(model, picture).tolist()
    tokens = [token for token in picture.packed if token is not None]
    groups = [tokens]
    if per == "crop":
        groups = [
            sorted(token for token in tokens if token[0] == crop)
            for crop in range(len(picture.crops))
        ]
    best: set[tuple[int, int]] = set()
    for group in groups:
        order = sorted(range(len(group)), key=lambda n: (-scores[group[n][0]][group[n][1]], n))
        best |= {group[n] for n in order[:keep]}
    return best


@torch.no_grad()
def greedy(
    model: LlavaNextForConditionalGeneration,
    prompt: Prompt,
    keep: int,
    steps: int,
    per: str = "image",
    newline: str = "keep",
) -> tuple[list[int], Tensor]:
    """Greedy text of one prompt from hand-made embeddings, recomputed for every token."""
    core = model.model
    embed = core.get_input_embeddings()
    pieces = []
    for part in prompt.parts:
        if not isinstance(part, Picture):
            pieces.append(embed(torch.tensor([part])))
            continue
        states = core.vision_tower(pixel_values=part.crops, output_hidden_states=True)
        projected = core.multi_modal_projector(states.hidden_states[-2][:, 1:])
        best = kept(model, part, keep, per)
        for token in part.packed:
            if token is None:
                if newline == "keep":
                    pieces.append(core.image_newline[None])
            elif token in best:
                pieces.append(projected[token[0], token[1]][None])
    embeds = torch.cat(pieces)[None]
    text, logits = [], []
    for _ in range(steps):
        hidden = core.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        logits.append(model.lm_head(hidden[0, -1]))
        text.append(int(logits[-1].argmax()))
        embeds = torch.cat([embeds, embed(torch.tensor([text[-1:]]))], 1)
    return text, torch.stack(logits)
