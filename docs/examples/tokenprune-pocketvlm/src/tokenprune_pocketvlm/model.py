"""PocketVLM: a vision tower with [CLS], a projector and a causal decoder, in plain torch.

It knows nothing of tokenprune. Like the big ones it takes left-padded prompts with one id per
visual token, and computes positions from the padding mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE = 1
"""The id that stands for one visual token of a prompt."""


@dataclass(frozen=True)
class Config:
    """Sizes of a PocketVLM."""

    vocabulary: int = 50
    width: int = 24
    heads: int = 3
    vision_layers: int = 3
    layers: int = 3
    side: int = 4
    patch: int = 4
    positions: int = 96

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of a picture."""
        return self.side**2


@dataclass(eq=False)
class Cache:
    """Keys and values of each layer of the decoder, `(batch, heads, tokens, channels)`."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Everything that a layer has seen, the new tokens included."""
        if layer == len(self.keys):
            self.keys.append(key)
            self.values.append(value)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], key], dim=2)
            self.values[layer] = torch.cat([self.values[layer], value], dim=2)
        return self.keys[layer], self.values[layer]


@dataclass
class Output:
    """The `(batch, vocabulary)` logits of the next token, and the cache."""

    logits: Tensor
    cache: Cache


class Attention(nn.Module):
    """Multi-head attention."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.query, self.key, self.value, self.out = (
            nn.Linear(config.width, config.width) for _ in range(4)
        )

    def forward(
        self, x: Tensor, visible: Tensor | None, cache: Cache | None = None, layer: int = 0
    ) -> Tensor:
        q, k, v = (self.split(part(x)) for part in (self.query, self.key, self.value))
        if cache is not None:
            k, v = cache.update(layer, k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> Tensor:
        """`(batch, tokens, width)` to `(batch, heads, tokens, channels)`."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Attention and an MLP, each after a norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.before = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.between = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 2 * config.width),
            nn.GELU(),
            nn.Linear(2 * config.width, config.width),
        )

    def forward(
        self, x: Tensor, visible: Tensor | None, cache: Cache | None = None, layer: int = 0
    ) -> Tensor:
        x = x + self.attention(self.before(x), visible, cache, layer)
        return x + self.mlp(self.between(x))


class Vision(nn.Module):
    """A ViT: [CLS], then the patches."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.patch = config.patch
        self.embed = nn.Linear(3 * config.patch**2, config.width)
        self.cls = nn.Parameter(torch.zeros(config.width))
        self.place = nn.Parameter(torch.zeros(1 + config.visual_tokens, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.vision_layers))

    def forward(self, pixels: Tensor) -> Tensor:
        """`(images, 3, height, width)` to `(images, 1 + visual tokens, width)`."""
        patches = F.unfold(pixels, self.patch, stride=self.patch).transpose(1, 2)
        cls = self.cls.expand(len(pixels), 1, -1)
        x = torch.cat([cls, self.embed(patches)], dim=1) + self.place
        for block in self.blocks:
            x = block(x, None)
        return x


class Decoder(nn.Module):
    """A causal transformer over embeddings."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.place = nn.Embedding(config.positions, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))

    def forward(self, embeds: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """`(batch, tokens, width)` hidden states.

        Args:
            embeds: `(batch, tokens, width)` of the new tokens.
            mask: `(batch, past + tokens)` bool, False where a prompt is padded.
            positions: `(batch, tokens)` of the new tokens.
            cache: what the past tokens left; the new ones are added.
        """
        tokens, stored = embeds.shape[1], mask.shape[1]
        slots = torch.arange(stored, device=mask.device)
        own = slots[stored - tokens :, None]
        # A padded slot sees itself, because attention to nothing is NaN.
        visible = (slots <= own) & mask[:, None, None, :] | (slots == own)
        x = embeds + self.place(positions)
        for layer, block in enumerate(self.blocks):
            x = block(x, visible, cache, layer)
        return x


class PocketVLM(nn.Module):
    """Answers questions about pictures, at random: nobody has trained it."""

    def __init__(self, config: Config = Config()) -> None:
        super().__init__()
        self.config = config
        self.vision = Vision(config)
        self.projector = nn.Sequential(
            nn.Linear(config.width, config.width), nn.GELU(), nn.Linear(config.width, config.width)
        )
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.decoder = Decoder(config)
        self.head = nn.Linear(config.width, config.vocabulary)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        pixels: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Output:
        """Logits of the token after `ids`.

        Args:
            ids: `(batch, tokens)` of the new tokens, `IMAGE` at each visual one.
            mask: `(batch, past + tokens)` bool, False where a prompt is padded (on the left).
            pixels: `(images, 3, height, width)` of all pictures, in the order of the prompts.
            cache: of the past tokens.
        """
        embeds = self.embed(ids)
        if pixels is not None:
            patches = self.vision(pixels)[:, 1:]
            embeds = embeds.masked_scatter((ids == IMAGE)[:, :, None], self.projector(patches))
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        cache = Cache() if cache is None else cache
        hidden = self.decoder(embeds, mask=mask, positions=positions, cache=cache)
        return Output(self.head(hidden[:, -1]), cache)

    @torch.no_grad()
    def generate(
        self, ids: Tensor, mask: Tensor, pixels: Tensor | None = None, steps: int = 8
    ) -> tuple[Tensor, Tensor]:
        """Greedy `(batch, steps)` ids and `(batch, steps, vocabulary)` logits, with a cache."""
        output = self(ids, mask, pixels)
        text, logits = [], [output.logits]
        for step in range(steps):
            text.append(logits[-1].argmax(-1))
            if step < steps - 1:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                output = self(text[-1][:, None], mask, cache=output.cache)
                logits.append(output.logits)
        return torch.stack(text, dim=1), torch.stack(logits, dim=1)
