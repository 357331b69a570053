"""Independent oracles: one prompt at a time, no padding, no cache, hand-built embeddings.

Nothing of tokenprune is imported here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from .llava import IMAGE, Row


@torch.no_grad()
def eager_scores(
    model: LlavaForConditionalGeneration, images: Tensor, layers: int, ensemble: str = "avg"
) -> Tensor:
    """VTC-CLS scores by the released way: full attention maps of an eager tower."""
    tower = model.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        maps = tower(pixel_values=images, output_attentions=True).attentions
    finally:
        tower.set_attn_implementation(before)
    per_layer = torch.stack([a[:, :, 0, 1:].mean(1) for a in maps[-1 - layers : -1]])
    return {"avg": per_layer.mean(0), "max": per_layer.amax(0), "min": per_layer.amin(0)}[ensemble]


@torch.no_grad()
def kept_indices(scores: Tensor, keep: int) -> list[list[int]]:
    """The `keep` best per image: score descending, then index ascending; in raster order."""
    return [
        sorted(sorted(range(len(row)), key=lambda n: (-row[n], n))[:keep])
        for row in scores.tolist()
    ]


@torch.no_grad()
def compressed_embeddings(
    model: LlavaForConditionalGeneration, row: Row, keep: int, positions: str, layers: int = 3
) -> tuple[Tensor, Tensor]:
    """`(1, tokens, channels)` embeddings of one prompt with kept tokens only, and positions."""
    core = model.model
    embed = core.get_input_embeddings()
    pieces, places, place = [], [], 0
    for part in row.parts:
        if isinstance(part, Tensor):
            states = core.vision_tower(pixel_values=part[None], output_hidden_states=True)
            patches = states.hidden_states[-2][0, 1:]
            kept = kept_indices(eager_scores(model, part[None], layers), keep)[0]
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


@torch.no_grad()
def greedy(
    model: LlavaForConditionalGeneration,
    row: Row,
    keep: int,
    steps: int,
    positions: str = "reindexed",
    layers: int = 3,
) -> tuple[list[int], Tensor]:
    """Greedy text of one prompt, recomputed from scratch for every token; and its logits."""
    embeds, places = compressed_embeddings(model, row, keep, positions, layers)
    place = len(row.ids) if positions == "original" else places.shape[1]
    text, logits = [], []
    for _ in range(steps):
        length = embeds.shape[1]
        visible = torch.ones(length, length, dtype=torch.bool).tril()
        hidden = model.model.language_model(
            inputs_embeds=embeds,
            position_ids=places,
            attention_mask=torch.zeros(1, 1, length, length).masked_fill(~visible, -1e30)
            if model.config._attn_implementation == "eager"
            else visible[None, None],
            use_cache=False,
        ).last_hidden_state
        logits.append(model.lm_head(hidden[0, -1]))
        text.append(int(logits[-1].argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([text[-1:]]))], 1)
        places = torch.cat([places, torch.tensor([[place]])], 1)
        place += 1
    assert IMAGE not in row.ids[-1:]
    return text, torch.stack(logits)
