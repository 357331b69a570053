"""Two prompts of different length with three pictures, encoded by hand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention_maps import scorer, see


@dataclass(frozen=True, eq=False)
class Part:
    """Part of a prompt, encoded by hand: a picture, a video, or text.

    Attributes:
        ids: `(tokens,)` int64, for a picture its placeholders.
        embeds: `(tokens, channels)` as the language model gets them.
        scores: `(tokens,)` of the vision tower; inf for what no budget counts, such as text.
    """

    ids: Tensor
    embeds: Tensor
    scores: Tensor


class Pictures(ABC):
    """Three pictures for a model, as a processor would hand them over, and encoded by hand.

    Args:
        model: vanilla model.

    Attributes:
        scorer: spec of what the scores of the parts are, once a tower has seen them.
    """

    scorer: str

    def __init__(self, model: Any) -> None:
        self.model = model
        self.core = model.model
        self.config = model.config

    @abstractmethod
    def parts(self) -> Sequence[Part]:
        """The three, encoded by hand."""

    @abstractmethod
    def arguments(self) -> dict[str, Tensor]:
        """Pixels and whatever else the model takes with them."""

    def see(self, tower: Any, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of [CLS], features of the patches, and scores; see `attention_maps.see`."""
        cls, patches, scores = see(tower, pixels, self.config)
        self.scorer = scorer(self.config, has_cls=cls.shape[1] > 0)
        return cls, patches, scores

    def noise(self, *shape: int, seed: int) -> Tensor:
        """Random pixels, the same for the same seed; `(*shape, 3, side, side)`."""
        side = int(self.config.vision_config.image_size)
        made = torch.randn(*shape, 3, side, side, generator=torch.Generator().manual_seed(seed))
        return made.to(self.model.device, self.model.dtype)

    def shown(self, placeholder: int, embeds: Tensor, scores: Tensor) -> Part:
        """A picture, each token of which stands at a `placeholder`."""
        ids = torch.full((len(embeds),), placeholder, device=embeds.device)
        return Part(ids, embeds, scores)


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt, encoded by hand.

    Attributes:
        ids: `(slots,)` int64.
        embeds: `(slots, channels)`.
        scores: `(slots,)` of the vision tower.
        groups: slots of the patches of each picture.
    """

    ids: Tensor
    embeds: Tensor
    scores: Tensor
    groups: tuple[Tensor, ...]

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Prompt:
        """The prompt that is made of these parts."""
        groups, start = [], 0
        for part in parts:
            groups.append(start + part.scores.isfinite().nonzero()[:, 0])
            start += len(part.ids)
        return cls(
            torch.cat([part.ids for part in parts]),
            torch.cat([part.embeds for part in parts]),
            torch.cat([part.scores for part in parts]),
            tuple(group for group in groups if len(group)),
        )


def prompts(model: Any, pictures: Sequence[Part]) -> list[Prompt]:
    """Two prompts, the first about one of three pictures, the second about the other two."""
    left = words(model, [int(part.ids[0]) for part in pictures], 17)

    def said(count: int) -> Part:
        nonlocal left
        ids, left = left[:count], left[count:]
        embeds = model.get_input_embeddings()(ids)
        return Part(ids, embeds, torch.full((count,), torch.inf, device=model.device))

    one, two, three = pictures
    return [
        Prompt.of([said(3), one, said(4)]),
        Prompt.of([said(2), two, said(3), three, said(5)]),
    ]


def words(model: Any, special: Iterable[int], count: int) -> Tensor:
    """`(count,)` ids of text, none of which is `special` or named in the model's config."""
    text = model.config.get_text_config()
    named = {
        value
        for config in (model.config, text)
        for name, value in vars(config).items()
        if name.endswith("token_id")
    }
    plain = torch.tensor([n for n in range(text.vocab_size) if n not in {*special, *named}])
    chosen = torch.randint(len(plain), (count,), generator=torch.Generator().manual_seed(0))
    return plain[chosen].to(model.device)


def collated(prompts: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """`(slots,)` ids of prompts with padding on the left, and the mask that says where it is."""
    width = max(map(len, prompts))
    fills = [width - len(prompt) for prompt in prompts]
    ids = [
        torch.cat([prompt.new_full((fill,), pad), prompt])
        for fill, prompt in zip(fills, prompts, strict=True)
    ]
    columns = torch.arange(width, device=ids[0].device)
    mask = torch.stack([(columns >= fill).long() for fill in fills])
    return torch.stack(ids), mask
