"""Independent oracles for reduction after a layer, one prompt at a time, without padding or cache.

Every token of the text is recomputed from scratch with the decoder layers of the vanilla model.
`"mask"` computes all slots and hides what is dropped from later layers with -inf; `"drop"` takes it
out of the sequence. Nothing of tokenprune's adapters is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .llava import Row
from .oracle import eager_scores, kept_indices


@dataclass(frozen=True)
class Look:
    """What is known of one image where a stage decides: everything has one entry per token.

    Attributes:
        hidden: `(tokens, channels)` states that enter the stage's layer.
        last, text: attention in the layer before: of the prompt's last token, and the mean over
            all text tokens after the image.
        cls: VTC-CLS scores of the vision tower.
        sizes: how many patches each token stands for.
    """

    hidden: Tensor
    last: Tensor
    text: Tensor
    cls: Tensor
    sizes: Tensor


Decide = Callable[[Look], Tensor]
"""`(kept, tokens)` weights; a kept token stands at the smallest member of its row."""


@dataclass(frozen=True)
class Cut:
    """A stage: what it keeps, before which layer, and how positions count from there on."""

    start: int
    decide: Decide
    positions: str = "original"


def evict(keep: int, by: str = "last") -> Decide:
    """The `keep` best by a field of `Look`: score descending, then index ascending."""

    def decide(look: Look) -> Tensor:
        scores: Tensor = getattr(look, by)
        return torch.eye(len(scores))[kept_indices(scores[None], keep)[0]]

    return decide


class Recompute:
    """One prompt, read again and again by the layers of a vanilla model.

    What a stage keeps of an image is decided when the prompt is first read, and stays.

    Args:
        model: vanilla, not attached.
        row: the prompt.
        cuts: stages inside the language model.
        before: tokens kept per image before the language model (by VTC-CLS scores), or None.
        style: ``"mask"`` or ``"drop"``.
        positions: of what is kept before the language model.
    """

    def __init__(
        self,
        model: Any,
        row: Row,
        cuts: list[Cut],
        before: int | None = None,
        style: str = "mask",
        positions: str = "reindexed",
    ) -> None:
        self.model, self.cuts, self.style = model, {cut.start: cut for cut in cuts}, style
        self.before, self.positions = before, positions
        self.decided: dict[tuple[int, int], tuple[list[int], Tensor]] = {}
        self.prompt = torch.empty(0, model.config.text_config.hidden_size)
        self.images: list[int] = []  # of each slot, -1 for text, -2 for what is neither
        self.places: list[int] = []
        self.cls: list[float] = []
        self.next_place = 0
        self.computed: dict[int, int] = {}  # slots, by layer, of the latest reading
        self.alive: list[int] = []  # slots that are left at the end, of the latest reading
        self.extend(row.parts)

    def extend(self, parts: list[int | Tensor]) -> None:
        """More of the prompt: a further turn."""
        core = self.model.model
        pieces = [self.prompt]
        for part in parts:
            if not isinstance(part, Tensor):
                pieces.append(core.get_input_embeddings()(torch.tensor([part])))
                self.images.append(-1)
                self.cls.append(0.0)
                self.places.append(self.next_place)
                self.next_place += 1
                continue
            states = core.vision_tower(pixel_values=part[None], output_hidden_states=True)
            patches = states.hidden_states[-2][0, 1:]
            scores = eager_scores(self.model, part[None])
            kept = list(range(len(patches)))
            if self.before is not None:
                kept = kept_indices(scores, self.before)[0]
            pieces.append(core.multi_modal_projector(patches[kept]))
            self.images += [max(self.images, default=-1) + 1] * len(kept)
            self.cls += scores[0, kept].tolist()
            old = self.positions == "original"
            self.places += [self.next_place + (n if old else m) for m, n in enumerate(kept)]
            self.next_place += len(patches) if old else len(kept)
        self.prompt = torch.cat(pieces)

    @torch.no_grad()
    def logits(self, text: list[int]) -> Tensor:
        """`(vocabulary)` after the prompt and `text`."""
        states = self.hidden(text)
        return self.model.lm_head(states[-1][self.alive[-1]])

    def hidden(self, text: list[int] | None = None) -> list[Tensor]:
        """All hidden states, `(slots, channels)` each; with `"drop"` of the slots left there."""
        text = text or []
        llm = self.model.model.language_model
        embed = self.model.get_input_embeddings()
        x = torch.cat([self.prompt, embed(torch.tensor(text, dtype=torch.int64))])
        slots = x.shape[0]
        places = torch.tensor(
            self.places + [self.next_place + n for n in range(len(text))], dtype=torch.int64
        )
        alive = torch.ones(slots, dtype=torch.bool)
        sizes = torch.ones(slots)
        states, maps = [x], None
        for number, layer in enumerate(llm.layers):
            if number in self.cuts:
                cut = self.cuts[number]
                for image in range(max(self.images) + 1):
                    if (number, image) not in self.decided:
                        assert not text, "decide on the prompt alone"
                        assert maps is not None
                        self._decide(cut, image, x, maps, alive, sizes)
                still, x, sizes = self._reduced(number, alive, x, sizes)
                if cut.positions == "reindexed":
                    places = places - (alive & ~still).cumsum(0)
                alive = still
            here = torch.arange(slots)[alive] if self.style == "drop" else torch.arange(slots)
            visible = torch.ones(slots, slots, dtype=torch.bool).tril()
            visible = (visible & alive) | torch.eye(slots, dtype=torch.bool)
            rotary = llm.rotary_emb(x[None], position_ids=places[None])
            maps = _attention(layer, x, rotary, visible)
            short = tuple(part[:, here] for part in rotary)
            y = layer(
                x[here][None],
                attention_mask=self._mask(visible[here][:, here]),
                position_embeddings=short,
            )
            y = y[0] if isinstance(y, tuple) else y
            self.computed[number] = len(here)
            x = x.clone()
            x[here] = y[0]
            states.append(x)
        self.alive = alive.nonzero()[:, 0].tolist()
        states[-1] = llm.norm(states[-1])
        return states

    def _mask(self, visible: Tensor) -> Tensor:
        if self.model.model.language_model.config._attn_implementation == "eager":
            return torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)[None, None]
        return visible[None, None]

    def _decide(
        self, cut: Cut, image: int, x: Tensor, maps: Tensor, alive: Tensor, sizes: Tensor
    ) -> None:
        members = [n for n, each in enumerate(self.images) if each == image and bool(alive[n])]
        end = max(n for n, each in enumerate(self.images) if each == image)
        text = [n for n, each in enumerate(self.images) if each == -1 and n > end]
        last = int(alive.nonzero()[-1])  # of a prompt that ends with an image, what is left of it
        look = Look(
            x[members],
            maps[last, members],
            maps[text or [last]][:, members].mean(0),
            torch.tensor(self.cls)[members],
            sizes[members],
        )
        weights = cut.decide(look) if members else torch.empty(0, 0)
        self.decided[cut.start, image] = members, weights

    def _reduced(
        self, start: int, alive: Tensor, x: Tensor, sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        still, mixed, summed = alive.clone(), x.clone(), sizes.clone()
        for (number, _), (members, weights) in self.decided.items():
            if number != start:
                continue
            still[members] = False
            for mix in weights:
                group = [members[n] for n in mix.nonzero()[:, 0].tolist()]
                still[group[0]] = True
                if len(group) > 1:
                    mixed[group[0]] = mix[mix > 0] @ x[group]
                    summed[group[0]] = sizes[group].sum()
        return still, mixed, summed


@torch.no_grad()
def _attention(layer: Any, x: Tensor, rotary: Any, visible: Tensor) -> Tensor:
    """`(queries, keys)` attention of one layer, head mean."""
    attention = layer.self_attn
    normal = layer.input_layernorm(x)
    width = attention.head_dim
    cosine, sine = (part[0] for part in rotary)

    def heads(flat: Tensor) -> Tensor:
        split = flat.reshape(len(flat), -1, width).transpose(0, 1)
        half = width // 2
        turned = torch.cat([-split[..., half:], split[..., :half]], dim=-1)
        return split * cosine + turned * sine

    query, key = heads(attention.q_proj(normal)), heads(attention.k_proj(normal))
    key = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)
    logits = query @ key.mT * width**-0.5
    return logits.masked_fill(~visible, -torch.inf).softmax(-1).mean(0)


def greedy(
    model: Any, batch: list[Row], cuts: list[Cut], steps: int = 5, **options: Any
) -> tuple[Tensor, Tensor]:
    """`(rows, steps)` text and `(rows, steps, vocabulary)` logits, row by row."""
    return follow(model, batch, cuts, steps, lambda logits: logits.argmax(-1), **options)


def follow(
    model: Any,
    batch: list[Row],
    cuts: list[Cut],
    steps: int,
    choose: Callable[[Tensor], Tensor],
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Like `greedy`, with the next words of all rows chosen from `(rows, vocabulary)` logits."""
    return say([Recompute(model, row, cuts, **options) for row in batch], steps, choose)


def say(
    rows: list[Recompute],
    steps: int,
    choose: Callable[[Tensor], Tensor] = lambda logits: logits.argmax(-1),
) -> tuple[Tensor, Tensor]:
    """`(rows, steps)` text and `(rows, steps, vocabulary)` logits after what was read so far."""
    text: list[list[int]] = [[] for _ in rows]
    logits = []
    for _ in range(steps):
        logits.append(torch.stack([row.logits(said) for row, said in zip(rows, text, strict=True)]))
        for said, token in zip(text, choose(logits[-1]).tolist(), strict=True):
            said.append(token)
    return torch.tensor(text), torch.stack(logits, dim=1)
