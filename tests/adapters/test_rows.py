"""[CLS] rows and keys of CLIP towers, recomputed beside the tower's own attention kernel."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

import tokenprune
from support.llava import collate, generate, picture, prompts, tiny_llava
from support.oracle import eager_rows, eager_scores, greedy_batch, kept_indices
from tokenprune import (
    ClsAttention,
    ClsAttentionScorer,
    Keys,
    MissingSignalError,
    ShapeError,
    UnsupportedError,
)
from tokenprune_adapters.kit.attention_rows import attention

from .conftest import MakeLlava, leftovers

IMAGES = torch.stack([picture(seed) for seed in range(6)])
BLOCKS = 5


def rows(model: Any, layers: int | tuple[int, ...], feature_layer: int = -2) -> Tensor:
    tower = model.model.vision_tower
    signal = ClsAttention(layers)
    with torch.no_grad(), tokenprune.observe(tower, [signal], feature_layer=feature_layer) as seen:
        tower(pixel_values=IMAGES)
        return seen.signals[signal]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_rows_equal_those_of_eager_attention(llava: MakeLlava, attention: str, layers: int) -> None:
    model = llava(attention)
    wanted = eager_rows(model, IMAGES)[:, 4 - layers : 4]  # they end at the features, layer -2
    got = rows(model, layers)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert wanted.amax() > 0.3  # peaked: an error would show
    assert got.min() >= 0
    assert (got.sum(-1) < 1).all()  # [CLS] itself is left out, without renormalising


@pytest.mark.parametrize("layers", [(0,), (-1,), (4, 1), (-4, 3, -5)])
def test_explicit_layers_come_in_their_order(llava: MakeLlava, layers: tuple[int, ...]) -> None:
    wanted = eager_rows(llava(), IMAGES)[:, list(layers)]
    torch.testing.assert_close(rows(llava(), layers), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("feature_layer", [-1, -2, -4, 0, 2])
def test_k_layers_end_at_the_features(llava: MakeLlava, feature_layer: int) -> None:
    last = feature_layer % BLOCKS
    wanted = eager_rows(llava(), IMAGES)[:, last : last + 1]
    torch.testing.assert_close(rows(llava(), 1, feature_layer), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ensemble", ["avg", "max", "min"])
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_the_kept_set_is_that_of_eager_attention(
    llava: MakeLlava, layers: int, ensemble: str
) -> None:
    model = llava()
    stage = f"cls-attention(layers={layers}, ensemble={ensemble!r}) | evict(5) @ before-llm"
    with torch.no_grad(), tokenprune.attach(model, stage) as attachment:
        model(**collate(prompts()))
    images = collate(prompts())["pixel_values"]
    scores = eager_scores(model, images, layers, ensemble)
    assert attachment.last.plan.anchors.tolist() == kept_indices(scores, 5)
    assert attachment.last.scores is not None
    torch.testing.assert_close(attachment.last.scores, scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_observed_tower_returns_the_same_bits(attention: str, dtype: torch.dtype) -> None:
    tower = tiny_llava(attention).model.vision_tower.to(dtype)
    pixels = IMAGES.to(dtype)
    signals = [ClsAttention(3), ClsAttention((0, -1)), Keys(2)]
    with torch.no_grad():
        before = tower(pixel_values=pixels, output_hidden_states=True)
        with tokenprune.observe(tower, signals) as seen:
            during = tower(pixel_values=pixels, output_hidden_states=True)
            positional = tower(pixels)
            assert set(seen.signals) == set(signals)
            assert all(answer.isfinite().all() for answer in seen.signals.values())
        after = tower(pixel_values=pixels, output_hidden_states=True)
    for output in (during, after):
        assert torch.equal(output.pooler_output, before.pooler_output)
        for one, other in zip(output.hidden_states, before.hidden_states, strict=True):
            assert torch.equal(one, other)
    assert torch.equal(positional.last_hidden_state, before.last_hidden_state)
    assert leftovers(tower) == []


def test_observed_tokens_are_the_features(llava: MakeLlava) -> None:
    tower = llava().model.vision_tower
    with torch.no_grad(), tokenprune.observe(tower, [], feature_layer=2) as seen:
        states = tower(pixel_values=IMAGES, output_hidden_states=True).hidden_states
        # Hidden state 0 is the embeddings: block 2 gives number 3.
        assert torch.equal(seen.tokens.features, states[3][:, 1:])
        assert seen.tokens.lengths == (16,) * len(IMAGES)
        ids = seen.tokens.ids
        tower(pixel_values=IMAGES[4:])
        assert torch.equal(seen.tokens.ids, ids[4:])  # a picture is known by its pixels alone
    assert len(set(ids.tolist())) == len(IMAGES)


def test_keys_are_those_of_the_layer(llava: MakeLlava) -> None:
    tower = llava().model.vision_tower
    block: Any = getattr(tower, "vision_model", tower).encoder.layers[3]
    with torch.no_grad(), tokenprune.observe(tower, [Keys(-2)]) as seen:
        states = tower(pixel_values=IMAGES, output_hidden_states=True).hidden_states
    keys = block.self_attn.k_proj(block.layer_norm1(states[3]))[:, 1:]
    got = seen.signals[Keys(-2)]
    assert got.shape == (6, 4, 16, 8)  # images, heads, patches, channels
    torch.testing.assert_close(got.transpose(1, 2).flatten(2), keys, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", [4, 3, 1, [-3, -2], [1, 4], [3]])
def test_other_feature_layers(layer: int | list[int]) -> None:
    """Positive numbers count hidden states; several layers are concatenated, the last scores."""
    model = tiny_llava(feature_layer=layer)
    text, logits = greedy_batch(model, prompts(), 4, layers=1)
    with tokenprune.attach(model, "cls-attention(layers=1) | evict(4) @ before-llm"):
        answer = generate(model, collate(prompts()))
    assert torch.equal(answer.text, text)
    torch.testing.assert_close(answer.logits, logits, rtol=0, atol=1e-5)


def test_refusals(llava: MakeLlava) -> None:
    tower = llava().model.vision_tower
    with pytest.raises(ShapeError, match="layers=5 asks for 5 layers, but only 4 end at layer 3"):
        rows(llava(), 5)
    with pytest.raises(ShapeError, match=r"layers=\(7,\) asks for a layer outside of the model's"):
        rows(llava(), (7,))
    with pytest.raises(ShapeError, match="feature_layer=5 is not one of 5 layers"):
        rows(llava(), 1, feature_layer=5)
    with (
        tokenprune.observe(tower, [ClsAttention(1)]) as seen,
        pytest.raises(MissingSignalError, match="the tower has not run yet"),
    ):
        seen.signals[ClsAttention(1)]
    siglip = tiny_llava(tower="siglip", select="full").model.vision_tower
    with (
        pytest.raises(UnsupportedError, match="cannot give ClsAttention; it gives .*Keys"),
        tokenprune.observe(siglip, [ClsAttention(1)]),
    ):
        pass
    assert leftovers(tower) == leftovers(siglip) == []


def test_nothing_is_kept_after_a_pass_was_used(llava: MakeLlava) -> None:
    """What the tower gave is freed as soon as the strategy has run."""
    model, held = llava(), []
    decide = ClsAttentionScorer.score

    def score(self: Any, tokens: Any, signals: Any) -> Any:
        held.append(weakref.ref(signals[ClsAttention(3)]))
        return decide(self, tokens, signals)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(ClsAttentionScorer, "score", score)
        with tokenprune.attach(model, "cls-attention | evict(4) @ before-llm"):
            model(**collate(prompts()))
            assert [reference() for reference in held] == [None]


def test_a_row_by_hand() -> None:
    """One query, two heads of four channels: softmax(q . k / 2) per head."""
    query = torch.tensor([[[[1.0, 0, 0, 0]], [[0, 2.0, 0, 0]]]])
    first = [[0.0, 9, 9, 9], [1.0, 9, 9, 9], [2.0, 9, 9, 9]]
    second = [[9, 1.0, 9, 9], [9, -1.0, 9, 9], [9, 0.5, 9, 9]]
    got = attention(query, torch.tensor([[first, second]]))
    by_hand = [[0.0, 0.5, 1.0], [1.0, -1.0, 0.5]]
    torch.testing.assert_close(got[0, :, 0], torch.tensor(by_hand).softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_are_float32_whatever_the_model_is(dtype: torch.dtype) -> None:
    """Logits beyond the range of float16 do not become NaN."""
    query, keys = torch.full((1, 2, 1, 4), 300.0), torch.full((1, 2, 4, 4), 300.0)
    got = attention(query.to(dtype), keys.to(dtype))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.full((1, 2, 1, 4), 0.25))


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_received_and_given_attention_are_margins_of_the_eager_matrix(tower: str) -> None:
    """Among patches alone: [CLS] counts in the softmax, and neither gives nor receives."""
    vision = tiny_llava("eager", tower=tower, select="default" if tower == "clip" else "full")
    vision = vision.model.vision_tower
    images = torch.stack([picture(1), picture(2)])
    asked = [tokenprune.ReceivedAttention(layers=2), tokenprune.GivenAttention(layers=(1, -1))]
    with torch.no_grad():
        maps = vision(pixel_values=images, output_attentions=True).attentions
        with tokenprune.observe(vision, asked) as seen:
            vision(pixel_values=images)
    prefix = 1 if tower == "clip" else 0
    among = torch.stack(maps, dim=1)[..., prefix:, prefix:]
    received = among[:, -3:-1].mean(-2)
    given = among[:, [1, -1]].mean(-1)
    torch.testing.assert_close(seen.signals[asked[0]], received, atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.signals[asked[1]], given, atol=1e-5, rtol=0)


@torch.no_grad()
def test_pool_attention_is_what_the_probe_of_siglip_attends_to() -> None:
    vision = tiny_llava(tower="siglip", select="full").model.vision_tower
    images = torch.stack([picture(1), picture(2)])
    hidden = vision(pixel_values=images).last_hidden_state
    head = getattr(vision, "vision_model", vision).head
    head.probe.mul_(20)  # so that it prefers some patches
    weights = head.attention(
        head.probe.expand(2, -1, -1), hidden, hidden, need_weights=True, average_attn_weights=False
    )[1]
    with tokenprune.observe(vision, [tokenprune.PoolAttention()]) as seen:
        after = vision(pixel_values=images).last_hidden_state
    assert torch.equal(after, hidden)
    assert weights.std() > 0.01
    got = seen.signals[tokenprune.PoolAttention()]
    torch.testing.assert_close(got, weights[:, :, 0], atol=1e-5, rtol=0)


def test_a_siglip_tower_without_a_head_has_no_pool_attention() -> None:
    config = SiglipVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        vision_use_head=False,
    )
    with (
        pytest.raises(UnsupportedError, match="cannot give PoolAttention"),
        tokenprune.observe(SiglipVisionModel(config), [tokenprune.PoolAttention()]),
    ):
        pass
