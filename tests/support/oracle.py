"""Independent oracles: vanilla models on hand-built embeddings of the kept tokens.

`greedy` takes one prompt at a time, without padding, masks or cache. Nothing of tokenprune is
imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from .llava import PAD, Row

Keep: TypeAlias = int | Sequence[int | list[int]]


@torch.no_grad()
def eager_rows(model: LlavaForConditionalGeneration, images: Tensor) -> Tensor:
    """`(images, layers, heads, patches)` [CLS] rows, from the full attention maps of eager."""
    tower = model.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        maps = tower(pixel_values=images, output_attentions=True).attentions
    finally:
        tower.set_attn_implementation(before)
    return torch.stack([a[:, :, 0, 1:] for a in maps], dim=1)


def eager_scores(
    model: LlavaForConditionalGeneration, images: Tensor, layers: int = 3, ensemble: str = "avg"
) -> Tensor:
    """`(images, patches)` VTC-CLS scores: head mean, over the `layers` that end at the features."""
    rows = eager_rows(model, images).mean(2)
    last = feature_layers(model)[-1]
    # Hidden state number n comes out of block n - 1.
    per_layer = rows[:, last - layers : last]
    return {"avg": per_layer.mean(1), "max": per_layer.amax(1), "min": per_layer.amin(1)}[ensemble]


def feature_layers(model: LlavaForConditionalGeneration) -> list[int]:
    """Absolute numbers of the hidden states that are the features."""
    configured = model.config.vision_feature_layer
    states = model.config.vision_config.num_hidden_layers + 1
    return [n % states for n in (configured if isinstance(configured, list) else [configured])]


def patch_features(model: LlavaForConditionalGeneration, image: Tensor) -> Tensor:
    """`(patches, channels)` what the projector gets."""
    states = model.model.vision_tower(pixel_values=image[None], output_hidden_states=True)
    skipped = 1 if model.config.vision_feature_select_strategy == "default" else 0
    features = [states.hidden_states[n][0, skipped:] for n in feature_layers(model)]
    return torch.cat(features, dim=-1)


def kept_indices(scores: Tensor, keep: int) -> list[list[int]]:
    """The `keep` best per image: score descending, then index ascending; in raster order."""
    return [
        sorted(sorted(range(len(row)), key=lambda n: (-row[n], n))[:keep])
        for row in scores.tolist()
    ]


def compressed_embeddings(
    model: LlavaForConditionalGeneration,
    row: Row,
    keep: Keep,
    positions: str,
    layers: int = 3,
) -> tuple[Tensor, Tensor]:
    """`(1, tokens, channels)` embeddings of one prompt with kept tokens only, and positions.

    `keep` is how many, the same for all images or one number for each; or which of each.
    """
    core = model.model
    budgets = iter([keep] * len(row.images) if isinstance(keep, int) else keep)
    embed = core.get_input_embeddings()
    pieces, places, place = [], [], 0
    for part in row.parts:
        if isinstance(part, Tensor):
            patches, budget = patch_features(model, part), next(budgets)
            if isinstance(budget, int):
                kept = kept_indices(eager_scores(model, part[None], layers), budget)[0]
            else:
                kept = budget
            pieces.append(core.multi_modal_projector(patches[kept]))
            places += [place + n for n in kept]
            place += len(patches)
        else:
            pieces.append(embed(torch.tensor([part])))
            places.append(place)
            place += 1
    if positions == "reindexed":
        places = list(range(len(places)))
    return torch.cat(pieces)[None], torch.tensor([places])


def loss(
    model: LlavaForConditionalGeneration, batch: list[Row], keep: int, positions: str
) -> Tensor:
    """Mean cross entropy of the text (but BOS) of truly compressed prompts, with gradients."""
    losses = []
    for row in batch:
        embeds, places = compressed_embeddings(model, row, keep, positions)
        logits = model.lm_head(hidden_states(model, embeds, places)[-1][0])
        slots = [part for part in row.parts for _ in range(keep if isinstance(part, Tensor) else 1)]
        for slot, part in enumerate(slots[1:], start=1):
            if not isinstance(part, Tensor):
                losses.append(-logits[slot - 1].log_softmax(-1)[part])
    return torch.stack(losses).mean()


def hidden_states(
    model: LlavaForConditionalGeneration, embeds: Tensor, places: Tensor
) -> tuple[Tensor, ...]:
    """All hidden states of one compressed prompt, by the plainest call there is."""
    length = embeds.shape[1]
    visible = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    return model.model.language_model(
        inputs_embeds=embeds,
        position_ids=places,
        attention_mask=visible
        if model.model.language_model.config._attn_implementation == "sdpa"
        else torch.zeros(visible.shape).masked_fill(~visible, -1e30),
        use_cache=False,
        output_hidden_states=True,
    ).hidden_states


@torch.no_grad()
def greedy(
    model: LlavaForConditionalGeneration,
    row: Row,
    keep: Keep,
    steps: int = 6,
    positions: str = "reindexed",
    layers: int = 3,
) -> tuple[list[int], Tensor]:
    """Greedy text of one prompt, recomputed from scratch for every token; and its logits."""
    embeds, places = compressed_embeddings(model, row, keep, positions, layers)
    place = len(row.ids) if positions == "original" else places.shape[1]
    text, logits = [], []
    for _ in range(steps):
        logits.append(model.lm_head(hidden_states(model, embeds, places)[-1][0, -1]))
        text.append(int(logits[-1].argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([text[-1:]]))], 1)
        places = torch.cat([places, torch.tensor([[place]])], 1)
        place += 1
    return text, torch.stack(logits)


def greedy_batch(
    model: LlavaForConditionalGeneration,
    batch: list[Row],
    keep: Keep,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`(rows, steps)` text and `(rows, steps, vocabulary)` logits of `greedy`, row by row."""
    each = [greedy(model, row, keep, **options) for row in batch]
    return torch.tensor([text for text, _ in each]), torch.stack([logits for _, logits in each])


@torch.no_grad()
def padded_embeddings(
    model: LlavaForConditionalGeneration, batch: list[Row], keep: int
) -> dict[str, Tensor]:
    """A left padded batch of compressed prompts, for a vanilla `generate`."""
    each = [compressed_embeddings(model, row, keep, "reindexed")[0] for row in batch]
    width = max(embeds.shape[1] for embeds in each)
    pad = model.get_input_embeddings()(torch.tensor([[PAD]]))
    rows = [torch.cat([pad.expand(-1, width - e.shape[1], -1), e], 1) for e in each]
    mask = [[0] * (width - e.shape[1]) + [1] * e.shape[1] for e in each]
    return {"inputs_embeds": torch.cat(rows), "attention_mask": torch.tensor(mask)}
