"""Consistency of scores with the LLM's attention, layer by layer: VTC-CLS, section 3.2, figure 2.

    result = consistency(model, processor, samples, keeps=[128, 64])
    result.curve("cls-attention", "correlation").layers[1]  # layer 2, mean and standard error

The importance of a visual token in a layer of the LLM is the attention that it gets from the output
tokens, mean over heads and output tokens (equation 4). It is read while the unpruned model
generates, one row for each layer and token, by `tokenprune.watch`. `tokenprune analyze` is the
command.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..attachment import attach, watch
from ..bench.data import DataError, Sample
from ..bench.scoring import Mean, mean
from ..bench.setting import setting
from ..errors import ShapeError, UnsupportedError
from ..placement import BeforeLLM
from ..prompts import prompter
from ..scorers import RandomScorer
from ..strategy import Scorer, Stage
from .consistency import overlap, rank_correlation
from .curves import RANDOM, Consistency, Curve, Measure, Queries

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin
from .noted_scores import Scored, cls_ensembles, looks_of, scored


def consistency(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    scorers: Iterable[str | Scorer | Stage] | None = None,
    keeps: Sequence[int | float] = (0.25, 0.125),
    *,
    name: str = "",
    data: str = "",
    batch: int = 8,
    max_new_tokens: int = 16,
    text: Callable[[str], str] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Consistency:
    """Let the unpruned model answer, and compare scores with what its answers attend to.

    Random scores are compared as well, as the line that others must leave. Standard errors are
    clustered by picture.

    Args:
        model: a model with an adapter, not attached.
        processor: its processor.
        samples: what to ask, each about one picture; answers are not needed.
        scorers: scorers, or stages that start with one, as objects or specs; None for [CLS]
            attention ensembled over the last K = 1 to 5 layers.
        keeps: budgets of the overlap; int = count, float = fraction.
        name: name of the model, for the files.
        data: name of the data, for the files.
        batch: questions in one `generate`.
        max_new_tokens: longest answer.
        text: function from a question to a prompt; None for the processor's chat template.
        progress: function that is told after each batch how many questions were answered.

    Raises:
        DataError: no samples.
        UnsupportedError: the model's adapter cannot tell what the LLM attends to, or cannot give
            what a scorer reads.
        SpecError, UnknownNameError, BudgetError: a scorer or budget that cannot be used.
    """
    if not samples:
        raise DataError("an analysis needs at least one question")
    ask = text or prompter(processor)
    with watch(model):  # what cannot be told is said before anything else is found wrong
        pass
    given = cls_ensembles(model) if scorers is None else tuple(map(scored, scorers))
    random = Scored(RANDOM, RandomScorer(), given[0].placement if given else BeforeLLM())
    by_label = {each.label: each for each in (*given, random)}
    told = _Told(tuple(by_label.values()), tuple(keeps))
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        inputs = processor(
            images=[sample.picture() for sample in part],
            text=[ask(sample.question) for sample in part],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device, model.dtype)
        _answer(model, inputs, max_new_tokens, told)
        progress(len(part))
    return _result(model, samples, told, name, data)


@dataclass(eq=False)
class _Told:
    """Measures so far, question by question.

    Attributes:
        given: the scorers.
        keeps: budgets of the overlap.
        values: `(questions, layers)` float64 of each batch, by what was measured.
        tokens: visual tokens of each question's picture.
        answers: tokens of each answer.
    """

    given: tuple[Scored, ...]
    keeps: tuple[int | float, ...]
    values: dict[tuple[str, Measure, Queries, int | float | None], list[Tensor]] = field(
        default_factory=dict
    )
    tokens: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)

    def add(self, scores: dict[str, Tensor], attended: dict[Queries, Tensor], mask: Tensor) -> None:
        """Compare the scores of one batch with its attention.

        Args:
            scores: `(questions, tokens)` by scorer.
            attended: `(questions, layers, tokens)` by whose attention it is; NaN where nobody asks.
            mask: `(questions, tokens)` bool.
        """
        real = mask[:, None]
        for queries, asked in attended.items():
            nobody = asked.isnan().flatten(1).any(1)[:, None]
            llm = asked.double().nan_to_num(0.0)
            measured: dict[tuple[str, Measure, int | float | None], Tensor] = {
                ("", "share", None): llm.sum(-1)
            }
            for scorer, vision in scores.items():
                for keep in self.keeps:
                    shared = overlap(vision[:, None], llm, keep, real)
                    measured[scorer, "overlap", keep] = shared
                related = rank_correlation(vision[:, None], llm, real)
                measured[scorer, "correlation", None] = related
            for (scorer, measure, budget), values in measured.items():
                key = scorer, measure, queries, budget
                self.values.setdefault(key, []).append(values.masked_fill(nobody, math.nan))


@torch.inference_mode()
def _answer(model: PreTrainedModel, inputs: Any, max_new_tokens: int, told: _Told) -> None:
    """Generate answers to one batch, and compare."""
    stages, looks = looks_of(told.given)
    rows, length = inputs["input_ids"].shape
    with attach(model, *stages), watch(model) as attended:
        # One more: the last token is generated, but asks nothing.
        output = model.generate(
            **inputs, max_new_tokens=max_new_tokens + 1, do_sample=False, num_beams=1
        )
        patches, steps = attended.patches.cpu(), attended.steps.cpu()
    if patches.shape[0] != rows or any(len(look.seen) != 1 for look in looks):
        raise UnsupportedError(
            f"scores and attention can be compared for one picture in each prompt, but {rows} "
            f"prompts have {patches.shape[0]} pictures"
        )
    ends = _ends(model)
    answers = _lengths(output[:, length:].cpu(), ends, max_new_tokens)
    order = _by_patch(patches, patches >= 0)
    mask = (patches >= 0).gather(1, order)
    scores: dict[str, Tensor] = {}
    for look in looks:
        tokens, found = look.seen[0]
        seen, real = tokens.patches.cpu(), tokens.mask.cpu()
        same = _by_patch(seen, real)
        if not torch.equal(seen.masked_fill(~real, -1).gather(1, same), patches.gather(1, order)):
            raise UnsupportedError(
                f"the adapter of {type(model).__name__} tells what other patches got than those "
                "which it shows to scorers"
            )
        scores.update({label: each.cpu().gather(1, same) for label, each in found.items()})
    steps = steps.gather(3, order[None, :, None].expand(*steps.shape[:3], -1))
    told.add(
        {each.label: scores[each.label] for each in told.given},
        {"output": output_attention(steps, answers), "last": steps[0]},
        mask,
    )
    told.tokens += mask.sum(1).tolist()
    told.answers += answers


def output_attention(steps: Tensor, answers: Sequence[int]) -> Tensor:
    """The mean attention of the output tokens, `(images, layers, tokens)`: equation 4.

    Args:
        steps: `(steps, images, layers, tokens)`, see `tokenprune.Attended.steps`.
        answers: for each image, how many tokens its answer has, its end apart.

    Returns:
        NaN for an answer without tokens.
    """
    if steps.shape[1] != len(answers) or max(answers, default=0) >= max(steps.shape[0], 1):
        raise ShapeError(
            f"steps must have axes (steps images layers tokens) with {len(answers)} images and "
            f"more than {max(answers, default=0)} steps, got {tuple(steps.shape)}"
        )
    return torch.stack([steps[1 : 1 + count, n].mean(0) for n, count in enumerate(answers)])


def _by_patch(patches: Tensor, mask: Tensor) -> Tensor:
    """`(images, tokens)` int64 order of tokens by their patch, padding last."""
    return patches.masked_fill(~mask, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)


def _ends(model: PreTrainedModel) -> list[int]:
    """Ids that end a text."""
    config: Any = model.generation_config
    ends = config.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [int(ends)]


def _lengths(text: Tensor, ends: Sequence[int], most: int) -> list[int]:
    """How many tokens come before the first end, of `(questions, tokens)` ids."""
    ended = torch.isin(text, torch.tensor(ends, dtype=text.dtype))
    lengths: list[int] = (ended.cumsum(1) == 0).sum(1).clamp(max=most).tolist()
    return lengths


def _result(
    model: PreTrainedModel, samples: Sequence[Sample], told: _Told, name: str, data: str
) -> Consistency:
    groups = [sample.group for sample in samples]
    curves = []
    for (scorer, measure, queries, keep), parts in told.values.items():
        values = torch.cat(parts)
        layers = tuple(_mean(column, groups) for column in values.unbind(1))
        curves.append(
            Curve(scorer, measure, queries, keep, layers, _mean(values.nanmean(1), groups))
        )
    return Consistency(
        **setting(model, samples, name, data),
        tokens=sum(told.tokens) / len(told.tokens),
        answer=sum(told.answers) / len(told.answers),
        scorers=tuple(each.label for each in told.given),
        keeps=told.keeps,
        curves=tuple(curves),
    )


def _mean(values: Tensor, groups: Sequence[str]) -> Mean:
    """Over the questions for which there is a value."""
    known = [(v, g) for v, g in zip(values.tolist(), groups, strict=True) if not math.isnan(v)]
    if not known:
        return Mean(math.nan, math.nan, 0)
    return mean([value for value, _ in known], [group for _, group in known])
