"""Plain `forward`: logits at every slot, losses, hidden states, gradients, with and without cache.

The caller sees the prompt at its logical length: a dropped slot shows the state of the last token
kept before it.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune
from support import oracle
from support.flash import flash_attention
from support.llava import BOS, Row, collate, picture, prompts, spec, tiny_llava

from .conftest import MakeLlava

BOTH_POSITIONS = pytest.mark.parametrize("positions", ["reindexed", "original"])


def close(got: Tensor, wanted: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


@torch.no_grad()
def forward(model: Any, inputs: dict[str, Any], keep: int, positions: str, **options: Any) -> Any:
    with tokenprune.attach(model, spec(keep, positions)):
        return model(**inputs, **options)


@torch.no_grad()
def logical(model: Any, row: Row, keep: int, positions: str) -> list[Tensor]:
    """Hidden states of one compressed prompt, spread over its logical slots by hand."""
    embeds, places = oracle.compressed_embeddings(model, row, keep, positions)
    states = oracle.hidden_states(model, embeds, places)
    _, kept_places = oracle.compressed_embeddings(model, row, keep, "original")
    shown = [int((kept_places <= slot).sum()) - 1 for slot in range(len(row.ids))]
    return [each[0, shown] for each in states]


@BOTH_POSITIONS
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hidden_states_and_logits_stand_at_logical_slots(
    llava: MakeLlava, positions: str, side: str, use_cache: bool, attention: str
) -> None:
    model, inputs = llava(attention), collate(prompts(), side)
    out = forward(model, inputs, 4, positions, use_cache=use_cache, output_hidden_states=True)
    assert out.logits.shape[:2] == inputs["input_ids"].shape
    assert (out.past_key_values is None) == (not use_cache)
    for number, row in enumerate(prompts()):
        real = inputs["attention_mask"][number].bool()
        wanted = logical(model, row, 4, positions)
        assert len(out.hidden_states) == len(wanted)
        for got, state in zip(out.hidden_states, wanted, strict=True):
            assert got.shape[:2] == inputs["input_ids"].shape
            close(got[number, real], state)
        close(out.logits[number, real], model.lm_head(wanted[-1]))


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash"])
def test_one_unpadded_prompt_with_gaps_and_no_cache(llava: MakeLlava, attention: str) -> None:
    """Gapped positions without mask and cache look like several packed sequences: they are not."""
    model, row = llava("sdpa" if attention == "flash" else attention), prompts()[1]
    wanted = model.lm_head(logical(model, row, 4, "original")[-1])
    for masked in (True, False):
        inputs = collate([row])
        if not masked:
            del inputs["attention_mask"]
        if attention == "flash":
            with flash_attention(model):
                out = forward(model, inputs, 4, "original", use_cache=False)
        else:
            out = forward(model, inputs, 4, "original", use_cache=False)
        close(out.logits[0], wanted)


@BOTH_POSITIONS
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_that_of_the_compressed_sequence(
    llava: MakeLlava, positions: str, side: str
) -> None:
    model = llava()
    inputs = collate(prompts(), side, labels=True)
    got = forward(model, inputs, 4, positions).loss
    with torch.no_grad():
        close(got, oracle.loss(model, prompts(), 4, positions), atol=2e-6)
        assert (got - model(**inputs).loss).abs() > 0.01  # compression does change it


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([-1, -4])])
def test_logits_to_keep(llava: MakeLlava, kept: int | Tensor) -> None:
    model, inputs = llava(), collate(prompts())
    states = forward(model, inputs, 4, "reindexed", output_hidden_states=True).hidden_states[-1]
    wanted = states[:, kept] if isinstance(kept, Tensor) else states[:, -kept:]
    some = forward(model, inputs, 4, "reindexed", logits_to_keep=kept).logits
    with torch.no_grad():
        assert torch.equal(some, model.lm_head(wanted))


def test_outputs_as_a_tuple(llava: MakeLlava) -> None:
    model, inputs = llava(), collate(prompts(), labels=True)
    wanted = forward(model, inputs, 4, "reindexed")
    loss, logits, *_ = forward(model, inputs, 4, "reindexed", return_dict=False)
    assert torch.equal(loss, wanted.loss)
    assert torch.equal(logits, wanted.logits)


def test_positional_input_ids(llava: MakeLlava) -> None:
    model, inputs = llava(), collate([prompts()[0]])
    wanted = forward(model, inputs, 4, "reindexed").logits
    with tokenprune.attach(model, spec(4)), torch.no_grad():
        got = model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]).logits
    assert torch.equal(got, wanted)


@BOTH_POSITIONS
def test_a_manual_loop_without_masks(llava: MakeLlava, positions: str) -> None:
    """Rows of one length need no mask; nobody passes position ids either."""
    model = llava()
    batch = [Row([BOS, 5, picture(1), 6, 7, 8]), Row([BOS, 9, 10, picture(2), 11, 12])]
    text, logits = oracle.greedy_batch(model, batch, 4, positions=positions)
    inputs = collate(batch)
    with tokenprune.attach(model, spec(4, positions)), torch.no_grad():
        out = model(inputs["input_ids"], inputs["pixel_values"])
        for step in range(text.shape[1]):
            close(out.logits[:, -1], logits[:, step])
            token = out.logits[:, -1:].argmax(-1)
            assert torch.equal(token[:, 0], text[:, step])
            out = model(input_ids=token, past_key_values=out.past_key_values)


@BOTH_POSITIONS
def test_gradients_are_those_of_the_compressed_sequence(positions: str) -> None:
    model = tiny_llava()
    wanted = _gradients(model, oracle.loss(model, prompts(), 4, positions))
    model.train()
    with tokenprune.attach(model, spec(4, positions)):
        got = _gradients(model, model(**collate(prompts(), labels=True)).loss)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    for name in ("multi_modal_projector.linear_1", "layers.0.self_attn.q_proj", "layers.2.mlp.up"):
        assert any(name in each and wanted[each].abs().max() > 1e-3 for each in wanted), name


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@BOTH_POSITIONS
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(positions: str, reentrant: bool) -> None:
    plain = tiny_llava().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    inputs = collate(prompts(), labels=True)
    results = []
    for model in (plain, checkpointed):
        with tokenprune.attach(model, spec(4, positions)):
            results.append(_gradients(model, model(**inputs, use_cache=False).loss))
    for name, gradient in results[0].items():
        if "embed_tokens" in name or "vision" in name:
            continue  # what requires gradients differs by enable_input_require_grads
        torch.testing.assert_close(results[1][name], gradient, rtol=0, atol=0, msg=name)


def _gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    found = {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }
    model.zero_grad()
    assert all(gradient.isfinite().all() for gradient in found.values())
    return found


@pytest.mark.parametrize("layer", [1, 3, 5])
def test_a_positive_feature_layer_counts_hidden_states(layer: int) -> None:
    """Hidden state n comes out of block n - 1, so that scores end there."""
    model = tiny_llava(feature_layer=layer)
    inputs = collate(prompts())
    single = "cls-attention(layers=1) | evict(4) @ before-llm"
    with torch.no_grad(), tokenprune.attach(model, single) as attachment:
        model(**inputs)
    scores = attachment.last.scores
    images = torch.cat([torch.stack(row.images) for row in prompts() if row.images])
    close(scores, oracle.eager_scores(model, images, layers=1))
    assert attachment.last.plan.anchors.tolist() == oracle.kept_indices(scores, 4)
