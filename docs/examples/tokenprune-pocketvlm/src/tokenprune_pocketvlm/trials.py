"""What `tokenprune doctor` needs to know: a tiny PocketVLM, and a vanilla run of it by hand."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tokenprune.trial import Answer, Cut, Questions, Trial

from .model import IMAGE, Cache, PocketVLM

KEEP = 4


# --8<-- [start:build]
def build() -> PocketVLM:
    """Random weights, scaled so that attention is peaked and logits are about 10."""
    model = PocketVLM().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 1.0 if weight.ndim < 2 or "embed" in name else 2 / weight.shape[1] ** 0.5
            scale = 0.1 if name.endswith("bias") else scale
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return model
    # --8<-- [end:build]


def picture(seed: int) -> Tensor:
    """`(3, 16, 16)` noise."""
    return torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(seed))


# --8<-- [start:trial]
def questions(model: nn.Module) -> Questions:
    """Two prompts of different length, with a picture each."""
    assert isinstance(model, PocketVLM)
    device = model.head.weight.device
    pixels = torch.stack([picture(1), picture(2)]).to(device)
    prompts = [([11, 12], [13]), ([21], [22, 23, 24, 25])]
    scores = cls_rows(model, pixels)
    patches = model.vision(pixels)[:, 1:]

    def ask() -> Answer:
        seats = [IMAGE] * model.config.visual_tokens
        ids = [[*before, *seats, *after] for before, after in prompts]
        longest = max(map(len, ids))
        padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids], device=device)
        return Answer(*model.generate(padded, padded != 0, pixels, steps=3))

    def by_hand(text: Tensor, shift: int) -> Tensor:
        rows = []
        for (before, after), row, features, said in zip(
            prompts, scores, patches, text, strict=True
        ):
            best = row.sort(descending=True, stable=True).indices[:KEEP]
            kept = ((best + shift) % len(row)).sort().values
            words = torch.tensor([*before, *after], device=device)
            embeds = model.embed(torch.cat([words, said[:-1]]))
            parts = embeds[: len(before)], model.projector(features[kept]), embeds[len(before) :]
            x = torch.cat(parts)[None]
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=device)
            hidden = model.decoder(x, mask, mask.cumsum(1) - 1, Cache())
            rows.append(model.head(hidden[0, -len(said) :]))
        return torch.stack(rows)

    spec = f"cls-attention(layers=1) | evict({KEEP}) @ before-llm"
    return Questions(ask, [Cut("before the LLM", spec, by_hand)])


def trials() -> Iterable[Trial]:
    """One, since there is one kind of PocketVLM."""
    yield Trial("PocketVLM", "tokenprune_pocketvlm", build, questions)
    # --8<-- [end:trial]


def cls_rows(model: PocketVLM, pixels: Tensor) -> Tensor:
    """`(pictures, patches)` attention of [CLS] in the last block, from the full map, head mean."""
    seen: list[Tensor] = []
    attention = model.vision.blocks[-1].attention
    handle = attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.vision(pixels)
    handle.remove()
    query, key = (attention.split(part(seen[0])) for part in (attention.query, attention.key))
    maps = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
    return maps.mean(1)[:, 0, 1:]
