"""Reducers that merge, and that keep unequal numbers of tokens, inside the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune
from support.inside_oracle import Cut, Decide, Look, Recompute, evict, greedy, say
from support.llava import PATCHES, Answer, collate, generate, prompts
from tokenprune import (
    AfterLayer,
    ClsAttentionScorer,
    Plan,
    Reducer,
    Signals,
    Strategy,
    VisualTokens,
)
from tokenprune.reducers import ToMe

POSITIONS = pytest.mark.parametrize("positions", ["original", "reindexed"])


def check(answer: Answer, wanted: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(answer.text, wanted[0])
    torch.testing.assert_close(answer.logits, wanted[1], rtol=0, atol=1e-5)


def reduced(model: Any, *stages: Any, steps: int = 4) -> Answer:
    with tokenprune.attach(model, *stages):
        return generate(model, collate(prompts()), steps=steps)


@dataclass(frozen=True)
class Neighbours(Reducer):
    """Every `size` tokens in a row become one."""

    size: int = 3

    def plan(self, tokens: VisualTokens, scores: Any, signals: Signals) -> Plan:
        slots = torch.arange(tokens.mask.shape[1])
        groups = (slots // self.size).expand(tokens.mask.shape)
        return Plan.group(groups.masked_fill(~tokens.mask, -1), tokens.sizes)


def neighbours(size: int) -> Decide:
    def decide(look: Look) -> Tensor:
        count = len(look.sizes)
        rows = []
        for start in range(0, count, size):
            weights = torch.zeros(count)
            members = range(start, min(start + size, count))
            for n in members:
                weights[n] = look.sizes[n] / sum(look.sizes[m] for m in members)
            rows.append(weights)
        return torch.stack(rows)

    return decide


@POSITIONS
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("before", [None, 10])
def test_merging(llava: Any, positions: str, attention: str, before: int | None) -> None:
    """Merged tokens are means of hidden states, at the place of their smallest member."""
    model = llava(attention)
    stages: list[Any] = [Strategy(Neighbours()).at(AfterLayer(1, positions))]  # type: ignore[arg-type]
    stages += [f"cls-attention | evict({before}) @ before-llm"] if before else []
    wanted = greedy(model, prompts(), [Cut(1, neighbours(3), positions)], 4, before=before)
    check(reduced(model, *stages), wanted)


@POSITIONS
def test_merging_twice_weighs_by_sizes(llava: Any, positions: str) -> None:
    """16 -> 6 (the last of size 1) -> 2: a mean of all that were merged, not a mean of means."""
    model = llava()
    cuts = [Cut(1, neighbours(3), positions), Cut(2, neighbours(4), positions)]
    stages = [
        Strategy(Neighbours(size)).at(AfterLayer(layer, positions))  # type: ignore[arg-type]
        for layer, size in ((1, 3), (2, 4))
    ]
    wanted = greedy(model, prompts(), cuts, 4)
    with tokenprune.attach(model, *stages) as attachment:
        check(generate(model, collate(prompts()), steps=4), wanted)
    assert attachment.last.tokens.sizes.tolist() == [[12.0, 4.0]] * 3


def test_sizes_come_along_from_before_the_llm(llava: Any) -> None:
    model = llava()
    stages = ["tome(5) @ before-llm", Strategy(Neighbours(5)).at(AfterLayer(2))]
    with tokenprune.attach(model, *stages) as attachment:
        generate(model, collate(prompts()), steps=1)
    assert attachment.last.tokens.sizes.tolist() == [[float(PATCHES)]] * 3


def test_merging_after_evicting_and_evicting_after_merging(llava: Any) -> None:
    model = llava()
    evicting = "cls-attention | evict(7) @ after-layer({})"
    merging = Strategy(Neighbours(3))
    cuts = [Cut(1, evict(7, "cls")), Cut(2, neighbours(3))]
    wanted = greedy(model, prompts(), cuts, 4)
    check(reduced(model, evicting.format(1), merging.at(AfterLayer(2))), wanted)
    # Scores are reduced like the features: the mean of a group.

    def merged_scores(look: Look) -> Tensor:
        scores = neighbours(3)(Look(**{**vars(look), "sizes": torch.ones(PATCHES)})) @ full[0]
        full.append(full.pop(0))
        return torch.eye(6)[sorted(sorted(range(6), key=lambda n: (-scores[n], n))[:4])]

    full = [
        torch.tensor(Recompute(model, row, []).cls)[
            [n for n, i in enumerate(Recompute(model, row, []).images) if i == image]
        ]
        for row in prompts()
        for image in range(len(row.images))
    ]
    cuts = [Cut(1, neighbours(3)), Cut(2, merged_scores)]
    wanted = greedy(model, prompts(), cuts, 4)
    evicting = "cls-attention | evict(4) @ after-layer(2)"
    check(reduced(model, merging.at(AfterLayer(1)), evicting), wanted)


@POSITIONS
@pytest.mark.parametrize("keep", [3, 9])
def test_tome(llava: Any, positions: str, keep: int) -> None:
    """What it merges in one image is told by `ToMe` itself; where that goes, by the oracle."""
    model = llava()

    def decide(look: Look) -> Tensor:
        tokens = VisualTokens.of(look.hidden[None], sizes=look.sizes[None])
        return ToMe(keep).plan(tokens, None, Signals()).dense()[0]

    wanted = greedy(model, prompts(), [Cut(2, decide, positions)], 4)
    check(reduced(model, f"tome({keep}) @ after-layer(2, positions={positions!r})"), wanted)


@dataclass(frozen=True)
class Above(Reducer):
    """Adaptive: tokens whose score is above a share of the best one."""

    share: float

    needs_scores = True

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        assert scores is not None
        scores = scores.masked_fill(~tokens.mask, 0)
        return Plan.select((scores > self.share * scores.amax(1, keepdim=True)) & tokens.mask)


def above(share: float, by: str = "cls") -> Decide:
    def decide(look: Look) -> Tensor:
        scores: Tensor = getattr(look, by)
        return torch.eye(len(scores))[scores > share * scores.max()]

    return decide


@POSITIONS
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_unequal_numbers_of_kept_tokens(llava: Any, positions: str, attention: str) -> None:
    """Images of one batch, and of one prompt, keep as many tokens as they deserve, twice."""
    model, inputs = llava(attention), collate(prompts())
    cuts = [Cut(1, above(0.3), positions), Cut(2, above(0.2, "last"), positions)]
    stages = [
        Strategy(ClsAttentionScorer(), Above(0.3)).at(AfterLayer(1, positions)),  # type: ignore[arg-type]
        Strategy(tokenprune.FastVScorer(), Above(0.2)).at(AfterLayer(2, positions)),  # type: ignore[arg-type]
    ]
    with tokenprune.attach(model, *stages) as attachment:
        answer = generate(model, inputs, steps=4)
    check(answer, greedy(model, prompts(), cuts, 4))
    kept = [image.after for image in attachment.report.images]
    assert len(set(kept)) > 1
    assert len(set(attachment.report.layers)) == 3


def test_unequal_numbers_from_before_the_llm_on(llava: Any) -> None:
    """The tower's scores are found again although images have kept unequal numbers of tokens."""
    model, inputs = llava(), collate(prompts())
    adaptive = Strategy(ClsAttentionScorer(), Above(0.3))
    late = "cls-attention | evict(3) @ after-layer(1)"
    with tokenprune.attach(model, adaptive.at(tokenprune.BeforeLLM()), late) as attachment:
        together = generate(model, inputs, steps=3)
        layers = attachment.report.layers
        alone = [generate(model, collate([row]), steps=3) for row in prompts()]
    assert layers[0][1] % 3 != 0 or layers[0][1] < 3 * PATCHES
    for row, answer in enumerate(alone):
        torch.testing.assert_close(answer.logits[0], together.logits[row], rtol=0, atol=1e-5)
    # The best three are the same whatever went before.
    scores = attachment.last.scores
    assert scores is not None
    rows = [Recompute(model, row, [Cut(1, evict(3, "cls"))]) for row in prompts()]
    say(rows, 1)


@pytest.mark.parametrize("share", [2.0])
def test_an_image_may_keep_nothing(llava: Any, share: float) -> None:
    model = llava()
    cuts = [Cut(1, above(share)), Cut(2, evict(3))]
    stages = [
        Strategy(ClsAttentionScorer(), Above(share)).at(AfterLayer(1)),
        "fastv | evict(3) @ after-layer(2)",
    ]
    check(reduced(model, *stages), greedy(model, prompts(), cuts, 4))


@pytest.mark.parametrize("by", ["last", "text"])
def test_an_image_of_one_token_is_asked_about_again(llava: Any, by: str) -> None:
    model, scorer = llava(), {"last": "fastv", "text": "fastv(queries='text')"}[by]
    stages = [f"{scorer} | evict(1) @ after-layer({layer})" for layer in (1, 2)]
    cuts = [Cut(layer, evict(1, by)) for layer in (1, 2)]
    check(reduced(model, *stages), greedy(model, prompts(), cuts, 4))
    seen: list[Tensor] = []

    def look(look: Look) -> Tensor:
        seen.append(getattr(look, by))
        return torch.eye(1)

    with tokenprune.attach(model, *stages) as attachment, torch.no_grad():
        model(**collate(prompts()))
    greedy(model, prompts(), [cuts[0], Cut(2, look)], 1)
    scores = attachment.last.scores
    torch.testing.assert_close(scores, torch.stack(seen), rtol=0, atol=1e-6)


@dataclass(frozen=True)
class Odd(Reducer):
    """Keeps all of every other image of the batch, nothing of the rest."""

    def plan(self, tokens: VisualTokens, scores: Any, signals: Signals) -> Plan:
        some = (torch.arange(tokens.mask.shape[0]) % 2 == 1)[:, None]
        return Plan.select(tokens.mask & some)


def test_some_images_may_keep_nothing(llava: Any) -> None:
    """Then a later stage finds images without tokens beside others."""
    model = llava()
    with tokenprune.attach(
        model,
        Strategy(Odd()).at(AfterLayer(1)),
        "fastv(queries='text') | evict(3) @ after-layer(2)",
    ) as attachment:
        answer = generate(model, collate(prompts()), steps=3)
    assert answer.logits.isfinite().all()
    assert [image.after for image in attachment.report.images] == [0, 3, 0]
    assert attachment.report.layers == ((0, 48), (1, 16), (2, 3))
