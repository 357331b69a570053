"""Stage 2: projector and language model learn to answer from the features of the frozen tower."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from .loop import Stage, Step
from .model import BOS, EOS, FEATURE_LAYER, IMAGE, PAD, TOKENS, VOCABULARY
from .task import Question, Scene, draw, questions
from .tower import pixels

_INDEX = {word: index for index, word in enumerate(VOCABULARY)}
_PREFIX = (BOS, _INDEX["user:"], *[IMAGE] * TOKENS)
_TURN = 9  # words of the longest question, its "assistant:" and its answer


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
        self, scenes: Sequence[Scene], asked: Sequence[Sequence[Question]], places: Tensor
    ) -> tuple[Tensor, float]:
        """Score the answers.

        Args:
            scenes: pictures.
            asked: for every scene equally many questions.
            places: `(scenes, 64)` int64, position ids of the visual tokens, counted from 0.

        Returns:
            The cross-entropy of answers and ends, and the fraction of answers that are right.
        """
        count = len(asked[0])
        turns, lengths = _turns(asked)
        prefix = torch.tensor(_PREFIX).expand(len(scenes), -1)
        ids = torch.cat([prefix, turns.flatten(1)], 1)
        with torch.no_grad():
            tower = self.model.model.vision_tower(pixels(scenes), output_hidden_states=True)
        visual = self.model.model.multi_modal_projector(tower.hidden_states[FEATURE_LAYER][:, 1:])
        words = self.model.get_input_embeddings()(ids)
        start = len(_PREFIX)
        embeddings = torch.cat([words[:, : start - TOKENS], visual, words[:, start:]], 1)
        hidden = self.model.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=_shared_prefix(count),
            position_ids=_positions(places, count),
            use_cache=False,
        ).last_hidden_state[:, start:]

        hidden = hidden.unflatten(1, (count, _TURN)).flatten(0, 1)
        rows = torch.arange(len(hidden))
        answers = turns.flatten(0, 1)[rows, lengths - 1]
        logits = self.model.lm_head(hidden[rows, lengths - 2])
        ends = self.model.lm_head(hidden[rows, lengths - 1])
        loss = functional.cross_entropy(logits, answers)
        loss = loss + functional.cross_entropy(ends, torch.full_like(answers, EOS))
        return loss, (logits.argmax(-1) == answers).float().mean().item()


def lessons(module: LanguageLessons, stage: Stage, seed: int) -> Step:
    """Every step asks about pictures that were never shown before."""

    def step(number: int) -> tuple[Tensor, float]:
        start = (seed << 32) + (1 << 31) + number * stage.batch
        scenes = [draw(start + i, "train") for i in range(stage.batch)]
        random = torch.Generator().manual_seed(start)
        places = stretched(stage.batch, random)
        asked = [questions(scene, 0) + questions(scene, 1) for scene in scenes]
        loss, accuracy = module(scenes, asked, places)
        return loss, accuracy

    return step


def stretched(rows: int, random: torch.Generator) -> Tensor:
    """Position ids of visual tokens, `(rows, 64)` int64: half the rows plain, half jittered.

    Jittered ids stay in order but advance by 0, 1 or 2, on average by between 0.2 and 1.8 in a
    row. All tokens are there; only their ids no longer tell where in the picture they lie, and
    the model learns to read that from the features.
    """
    rate = 0.1 + 0.8 * torch.rand(rows, 1, 1, generator=random)
    gaps = (torch.rand(rows, TOKENS, 2, generator=random) < rate).sum(-1)
    gaps[: rows // 2] = 1
    return gaps.cumsum(1) - gaps[:, :1]


def _turns(asked: Sequence[Sequence[Question]]) -> tuple[Tensor, Tensor]:
    """Token ids `(scenes, questions, 9)`, padded on the right; lengths `(scenes * questions)`."""
    turns = torch.full((len(asked), len(asked[0]), _TURN), PAD)
    lengths = []
    for rows, several in zip(turns, asked, strict=True):
        for row, question in zip(rows, several, strict=True):
            words = [*question.text.split(), "assistant:", question.answer]
            row[: len(words)] = torch.tensor([_INDEX[word] for word in words])
            lengths.append(len(words))
    return turns, torch.tensor(lengths)


def _shared_prefix(count: int) -> Tensor:
    """Additive mask `(1, 1, length, length)`: causal, and blind to other questions."""
    start = len(_PREFIX)
    turn = torch.cat([torch.zeros(start), 1 + torch.arange(count).repeat_interleave(_TURN)])
    seen = torch.ones(len(turn), len(turn), dtype=torch.bool).tril()
    seen &= (turn[None] == 0) | (turn[None] == turn[:, None])
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[None, None]


def _positions(places: Tensor, count: int) -> Tensor:
    """`(scenes, length)` int64: where each token is, every question right after the prefix."""
    before = len(_PREFIX) - TOKENS
    text = torch.arange(before).expand(len(places), -1)
    visual = before + places
    turn = visual[:, -1:] + 1 + torch.arange(_TURN)
    return torch.cat([text, visual, turn.repeat(1, count)], 1)
