"""Lessons of stage 2: projector and LLM learn to answer from the features of the frozen tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from tokenprune_adapters.pocket.scene import Scene, draw
from tokenprune_adapters.pocket.task import Question, questions

from .loop import Stage, Step
from .model import BOS, EOS, FEATURE_LAYER, TOKENS, VOCABULARY
from .tower import pixels

_INDEX = {word: index for index, word in enumerate(VOCABULARY)}
_PREFIX = (BOS, _INDEX["user:"])


class LanguageLessons(nn.Module):
    """A model whose tower is frozen, and which gets several questions about a picture at once.

    The questions share the picture's prefix: a question sees the prefix and itself, at the
    positions it would have were it alone, so it is computed exactly as in `generate`.
    """

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)

    def forward(
        self,
        scenes: Sequence[Scene],
        asked: Sequence[Sequence[Question]],
        shown: Tensor,
        places: Tensor,
    ) -> tuple[Tensor, float]:
        """Score the answers.

        Args:
            scenes: pictures.
            asked: questions about each.
            shown: `(scenes, tokens)` int64, the patches that the visual tokens show.
            places: `(scenes, tokens)` int64, their position ids, counted from 0.

        Returns:
            The cross-entropy of answers and ends, and the fraction of answers that are right.
        """
        turns = _turns(asked)
        with torch.no_grad():
            tower = self.model.model.vision_tower(pixels(scenes), output_hidden_states=True)
        visual = self.model.model.multi_modal_projector(tower.hidden_states[FEATURE_LAYER][:, 1:])
        visual = visual.take_along_dim(shown[..., None], 1)
        words = self.model.get_input_embeddings()
        before = words(torch.tensor(_PREFIX)).expand(len(scenes), -1, -1)
        embeddings = torch.cat([before, visual, words(turns.words)], 1)
        start = len(_PREFIX) + shown.shape[1]
        hidden = self.model.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=_shared_prefix(turns.number, start),
            position_ids=_positions(places, turns.place),
            use_cache=False,
        ).last_hidden_state[:, start:]

        # The word before an answer predicts the answer, which predicts the end.
        rows, ends = turns.answers
        answers = turns.words[rows, ends]
        logits = self.model.lm_head(hidden[rows, ends - 1])
        stops = self.model.lm_head(hidden[rows, ends])
        loss = functional.cross_entropy(logits, answers)
        loss = loss + functional.cross_entropy(stops, torch.full_like(answers, EOS))
        return loss, (logits.argmax(-1) == answers).float().mean().item()


def lessons(module: LanguageLessons, stage: Stage, seed: int) -> Step:
    """Every step asks about pictures that were never shown before."""

    def step(number: int) -> tuple[Tensor, float]:
        start = (seed << 32) + (1 << 31) + number * stage.batch
        scenes = [draw(start + i, "train") for i in range(stage.batch)]
        random = torch.Generator().manual_seed(start)
        if number % 4:
            shown = repeated(scenes, random)
            places = stretched(shown, random)
        else:
            shown = places = torch.arange(TOKENS).expand(stage.batch, -1)
        # A second variant repeats no question, such as the one for the count.
        asked = [tuple(dict.fromkeys(questions(one, 0) + questions(one, 1))) for one in scenes]
        loss, accuracy = module(scenes, asked, shown, places)
        return loss, accuracy

    return step


def repeated(scenes: Sequence[Scene], random: torch.Generator) -> Tensor:
    """Every patch of each picture in order, and up to 64 of them more than once.

    What share of the copies shows objects differs from picture to picture, so that the share of
    tokens which show objects does not tell how many objects there are.

    Returns:
        `(scenes, tokens)` int64, indices of patches, ascending.
    """
    copies = int(torch.randint(TOKENS + 1, (), generator=random))
    salient = torch.from_numpy(np.stack([scene.object_mask.reshape(-1) for scene in scenes]))
    share = torch.rand(len(scenes), 1, generator=random)
    objects = salient.float() / salient.sum(1, keepdim=True)
    rest = (~salient).float() / (~salient).sum(1, keepdim=True)
    weights = share * objects + (1 - share) * rest
    once = torch.arange(TOKENS).expand(len(scenes), -1)
    if copies:
        more = torch.multinomial(weights, copies, replacement=True, generator=random)
        once = torch.cat([once, more], 1)
    return once.sort(1).values


def stretched(shown: Tensor, random: torch.Generator) -> Tensor:
    """Position ids of visual tokens, shaped as `shown`, in order but with gaps of 0, 1 or 2.

    The mean gap of a picture is between 0.1 and 1.9. All tokens are there; only their ids no
    longer tell where in the picture they lie, and the model learns to read that from the features.
    """
    rate = 0.05 + 0.9 * torch.rand(len(shown), 1, 1, generator=random)
    gaps = (torch.rand(*shown.shape, 2, generator=random) < rate).sum(-1)
    return gaps.cumsum(1) - gaps[:, :1]


@dataclass(frozen=True)
class Turns:
    """Questions and answers of each picture, one after the other, padded on the right.

    Attributes:
        words: `(scenes, length)` int64 token ids.
        number: `(scenes, length)` int64, which turn a word belongs to, from 1; 0 is padding.
        place: `(scenes, length)` int64, of a word in its turn, from 0.
        answers: two times `(questions,)` int64, rows and columns of the answers.
    """

    words: Tensor
    number: Tensor
    place: Tensor
    answers: tuple[Tensor, Tensor]


def _turns(asked: Sequence[Sequence[Question]]) -> Turns:
    columns, rows, ends = [], [], []
    for row, several in enumerate(asked):
        column = []
        for number, question in enumerate(several, 1):
            words = [*question.text.split(), "assistant:", question.answer]
            column += [(_INDEX[word], number, place) for place, word in enumerate(words)]
            rows.append(row)
            ends.append(len(column) - 1)
        columns.append(torch.tensor(column))
    packed = nn.utils.rnn.pad_sequence(columns, batch_first=True)  # PAD is 0
    answers = torch.tensor(rows), torch.tensor(ends)
    return Turns(packed[..., 0], packed[..., 1], packed[..., 2], answers)


def _shared_prefix(number: Tensor, start: int) -> Tensor:
    """Additive mask `(scenes, 1, length, length)`: causal, and blind to other questions."""
    turn = functional.pad(number, (start, 0))
    length = turn.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen = seen & ((turn[:, None] == 0) | (turn[:, None] == turn[:, :, None]))
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[:, None]


def _positions(places: Tensor, words: Tensor) -> Tensor:
    """`(scenes, length)` int64: the prefix once, then every question right behind it."""
    before = torch.arange(len(_PREFIX)).expand(len(places), -1)
    visual = len(_PREFIX) + places
    return torch.cat([before, visual, visual[:, -1:] + 1 + words], 1)
