"""`fastv` ranks by the attention of the unmodified model, read from eager's full maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune
from support.llava import BOS, IMAGE, PATCHES, Row, collate, picture, prompts, tiny_llava
from tokenprune import FastVScorer
from tokenprune.errors import SpecError


@torch.no_grad()
def maps(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Attention of every layer, `(batch, heads, slots, slots)`, of the vanilla model."""
    before = model.model.language_model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return model(**inputs, output_attentions=True, use_cache=False).attentions
    finally:
        model.set_attn_implementation(before)


def wanted(attention: Tensor, inputs: dict[str, Tensor], queries: str) -> Tensor:
    """`(images, patches)` by the definition, image by image and slot by slot."""
    scores = []
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        real = [n for n, each in enumerate(inputs["attention_mask"][row].tolist()) if each]
        visual = [n for n in real if ids[n] == IMAGE]
        for start in range(0, len(visual), PATCHES):
            columns = visual[start : start + PATCHES]
            asking = [n for n in real if ids[n] != IMAGE and n > columns[-1]]
            asking = asking[-1:] if queries == "last" else asking
            scores.append(attention[row][:, asking][:, :, columns].mean((0, 1)))
    return torch.stack(scores)


@pytest.mark.parametrize("queries", ["last", "text"])
@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_scores_are_those_of_the_eager_map(
    llava: Any, queries: str, layer: int, attention: str, side: str, use_cache: bool
) -> None:
    """Of the layer before the stage, mean over query heads (of which two share a key head)."""
    model, inputs = llava(attention), collate(prompts(), side, extra=2)
    stage = f"fastv(queries={queries!r}) | evict(4) @ after-layer({layer})"
    with tokenprune.attach(model, stage) as attachment, torch.no_grad():
        model(**inputs, use_cache=use_cache)
    scores = attachment.last.scores
    assert scores is not None
    assert scores.dtype == torch.float32
    expected = wanted(maps(model, inputs)[layer - 1], inputs, queries)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)
    assert expected.std(1).min() > 1e-3  # there is something to rank
    assert (scores.sum(1) <= 1).all()


@pytest.mark.parametrize("queries", ["last", "text"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_text_asks_no_later_text_where_the_kernel_gets_no_mask(
    llava: Any, queries: str, attention: str
) -> None:
    """One prompt without padding: sdpa is causal by a flag."""
    model, inputs = llava(attention), collate(prompts()[1:2])
    stage = f"fastv(queries={queries!r}) | evict(4) @ after-layer(1)"
    with tokenprune.attach(model, stage) as attachment, torch.no_grad():
        model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
    expected = wanted(maps(model, inputs)[0], inputs, queries)
    torch.testing.assert_close(attachment.last.scores, expected, rtol=0, atol=1e-6)


def test_scores_are_float32_in_a_bfloat16_model() -> None:
    model = tiny_llava().to(torch.bfloat16)
    inputs = collate(prompts()) | {"pixel_values": collate(prompts())["pixel_values"].bfloat16()}
    with tokenprune.attach(model, "fastv | evict(4) @ after-layer(1)") as attachment:
        model(**inputs)
    scores = attachment.last.scores
    assert scores is not None
    assert scores.dtype == torch.float32
    assert all(row.unique().numel() == PATCHES for row in scores)  # in bfloat16 many would tie
    expected = wanted(maps(model, inputs)[0].float(), inputs, "last")
    torch.testing.assert_close(scores, expected, rtol=0.1, atol=1e-3)


def test_signals_of_several_layers(llava: Any) -> None:
    """A scorer may ask for any layers that have run on the same tokens."""

    class Both(tokenprune.Scorer):
        signal = tokenprune.LastQueryAttention(layers=(0, -1))

        @property
        def signals(self) -> frozenset[Any]:
            return frozenset({self.signal})

        def score(self, tokens: Any, signals: Any) -> Tensor:
            rows = signals[self.signal]
            assert rows.shape == (3, 2, 4, PATCHES)
            return rows.mean((1, 2))

    model, inputs = llava(), collate(prompts())
    stage = tokenprune.Strategy(Both(), tokenprune.Evict(4)).at(tokenprune.AfterLayer(2))
    with tokenprune.attach(model, stage) as attachment, torch.no_grad():
        model(**inputs)
    each = [wanted(layer, inputs, "last") for layer in maps(model, inputs)[:2]]
    scores = attachment.last.scores
    assert scores is not None
    torch.testing.assert_close(scores, torch.stack(each).mean(0), rtol=0, atol=1e-6)


def test_the_models_attention_is_never_computed_in_full(llava: Any) -> None:
    """The row costs `slots` numbers per head: the attention implementation stays what it was."""
    model = llava()
    with tokenprune.attach(model, "fastv | evict(4) @ after-layer(1)"), torch.no_grad():
        assert model.model.language_model.config._attn_implementation == "sdpa"
        assert not model(**collate(prompts())).attentions


def test_unknown_queries_are_refused() -> None:
    with pytest.raises(SpecError, match="queries must be 'last' or 'text', got 'first'"):
        FastVScorer(queries="first")  # type: ignore[arg-type]


def test_tokens_of_a_stage_inside_are_hidden_states_in_raster_order(llava: Any) -> None:
    """What strategies see: states that enter the layer, places in the image, one id per picture."""
    seen = []

    class Look(tokenprune.Scorer):
        def score(self, tokens: Any, signals: Any) -> Tensor:
            seen.append(tokens)
            return tokens.patches.float()

    model = llava()
    batch = [Row([BOS, picture(1), 5, picture(2)]), Row([BOS, 6, picture(1), 7])]
    inputs = collate(batch)
    strategy = tokenprune.Strategy(Look(), tokenprune.Evict(6))
    second = tokenprune.Strategy(Look(), tokenprune.Evict(2))
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    stages = [strategy.at(tokenprune.AfterLayer(1)), second.at(tokenprune.AfterLayer(2))]
    with tokenprune.attach(model, *stages), torch.no_grad():
        model(**inputs)
    first, later = seen
    visual = inputs["input_ids"] == IMAGE
    torch.testing.assert_close(first.features.flatten(0, 1), states[1][visual], rtol=0, atol=1e-5)
    assert torch.equal(first.patches, torch.arange(PATCHES).expand(3, -1))
    assert torch.equal(later.patches, torch.arange(PATCHES - 6, PATCHES).expand(3, -1))
    assert first.ids[0] == first.ids[2] != first.ids[1]
    assert torch.equal(later.ids, first.ids)
