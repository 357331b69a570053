"""What cannot be seen without an accelerator: hooks make tensors where the tensors of the call are.

While `meta` is the default device, a tensor made without saying where cannot meet one on the CPU.
A whole model of transformers runs so. What is to be brought from `meta` says that it cannot come.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import tokenprune
from support import llava_next, video_llava
from support.llava import Row, collate, generate, picture, prompts, tiny_llava
from support.llava_next import tiny_llava_next
from support.video_llava import tiny_video_llava
from tokenprune import ClsAttention, Signals
from tokenprune_adapters.hf.llm.cache_layers import Shortened, ShortenedDynamicLayer
from tokenprune_adapters.hf.llm.image_slots import feature_prints
from tokenprune_adapters.hf.llm.segment import Pass, Slots, enter
from tokenprune_adapters.hf.llm.signal_cache import SignalCache

from .conftest import MakeLlava

META = torch.device("meta")
STAGES = [
    "cls-attention | evict(4) @ before-llm",
    "cls-attention | evict(4) @ before-llm(positions='original')",
    "tome(5) @ before-llm",
    "fastv | evict(9) @ after-layer(1); cls-attention | evict(4) @ after-layer(2)",
    "fastv(queries='text') | evict(4) @ after-layer(1, positions='reindexed')",
    "random | evict(4) @ after-layer(1)",
    "tome(5) @ after-layer(1)",
    "uniform | evict(0) @ after-layer(1); uniform | evict(0) @ after-layer(2)",
    "cls-attention | evict(8) @ before-llm; fastv | evict(3) @ after-layer(2)",
]
INPUTS = collate(prompts())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attached_models_work_where_they_are(llava: MakeLlava, stage: str, attention: str) -> None:
    model = llava(attention)
    with tokenprune.attach(model, stage):
        wanted = generate(model, INPUTS, steps=2)
        with META:
            got = generate(model, INPUTS, steps=2)
    assert torch.equal(got.logits, wanted.logits)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family", ["next", "video"])
def test_tiles_and_videos_are_counted_wherever_the_model_is(family: str, stage: str) -> None:
    if family == "next":
        model, inputs = tiny_llava_next(), llava_next.collate(llava_next.prompts())
    else:
        model, inputs = tiny_video_llava(), video_llava.collate(video_llava.prompts())
    with tokenprune.attach(model, stage), torch.no_grad():
        wanted = model(**inputs).logits
        with META:
            got = model(**inputs).logits
    assert torch.equal(got, wanted)


def test_positions_that_nobody_gives_are_made_where_the_prompt_is(llava: MakeLlava) -> None:
    llm = llava().model.language_model
    embeds = llm.get_input_embeddings()(torch.arange(1, 9)[None])
    embeds[0, 3:5] = -torch.inf  # marks
    with torch.no_grad(), tokenprune.attach(llava(), STAGES[0]):
        wanted = llm(inputs_embeds=embeds).last_hidden_state
        with META:
            got = llm(inputs_embeds=embeds).last_hidden_state
        assert torch.equal(got, wanted)
        with pytest.raises(NotImplementedError, match="out of meta"):  # a mask is brought there
            llm(inputs_embeds=embeds, attention_mask=torch.ones(1, 8, device=META))


def test_watching_works_where_the_model_is(llava: MakeLlava) -> None:
    model = llava()
    with tokenprune.watch(model) as seen:
        generate(model, INPUTS, steps=2)
        wanted = seen.steps, seen.patches, seen.mask
        with META:
            generate(model, INPUTS, steps=2)
            got = seen.steps, seen.patches, seen.mask
    assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("stage", [STAGES[0], STAGES[4], STAGES[8]])
def test_packed_conversations_work_where_the_model_is(llava: MakeLlava, stage: str) -> None:
    model = llava()
    rows = [Row([1, 11, picture(1), 12, 13]), Row([1, picture(2), 21])]
    inputs = {
        "input_ids": torch.tensor([[token for row in rows for token in row.ids]]),
        "position_ids": torch.cat([torch.arange(len(row.ids)) for row in rows])[None],
        "pixel_values": torch.stack([image for row in rows for image in row.images]),
    }
    with torch.no_grad(), tokenprune.attach(model, stage):
        wanted = model(**inputs, use_cache=False).logits
        with META:
            got = model(**inputs, use_cache=False).logits
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_are_made_where_the_prompt_is(attention: str) -> None:
    """Wherever parameters are: those that are offloaded say nothing about it."""
    llm = tiny_llava(attention).model.language_model
    place = torch.arange(5, 8, device=META)[None]
    before = Shortened(2, None, torch.zeros(1, dtype=torch.int64, device=META), 4)
    whole = Pass(llm, DynamicCache(), 5, 3)
    segment = enter(Slots(None, None, place), before, whole, "original", 0)
    assert segment.mask is not None
    assert segment.mask.device == META
    assert segment.mask.shape == (1, 1, 3, 6)


def test_what_is_known_is_brought_to_the_prints() -> None:
    features = torch.rand(2, 3, 4)
    store = SignalCache(lambda: torch.float32)
    store.put(features, Signals({ClsAttention(1): torch.rand(2, 1, 1, 3, device=META)}))
    with pytest.raises(NotImplementedError, match="out of meta"):
        store.get(feature_prints(features).tolist(), features.device)


@pytest.mark.parametrize(
    "valid", [None, torch.ones(2, 3, dtype=torch.bool)], ids=["full", "ragged"]
)
def test_numbers_of_beams_are_brought_to_the_layers(valid: Tensor | None) -> None:
    """They come on one device, while layers may sit on several."""
    state = Shortened(1, valid, torch.zeros(2, dtype=torch.int64), 0)
    layer = ShortenedDynamicLayer.of(DynamicLayer(), state)
    layer.lazy_initialization(torch.rand(2, 1, 3, 4), torch.rand(2, 1, 3, 4))
    with pytest.raises(NotImplementedError, match="out of meta"):
        layer.reorder_cache(torch.tensor([1, 0], device=META))
