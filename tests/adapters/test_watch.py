"""What generated tokens attend to is what eager attention's full maps say, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import tokenprune
from adapters.conftest import leftovers
from support import llava, llava_next, video_llava
from support.flash import flash_attention
from tokenprune import Attended, UnsupportedError
from tokenprune.errors import AttachError, MissingSignalError, ShapeError

STEPS = 4


@dataclass
class Family:
    """A kind of model, prompts for it, and where the patches of each image sit in its ids."""

    build: Callable[..., Any]
    prompts: Callable[[], list[Any]]
    collate: Callable[[list[Any]], dict[str, Tensor]]
    places: Callable[[Any], list[list[int]]]


def _of_next(prompt: Any) -> list[list[int]]:
    """Crop times patches plus patch of each slot of each picture; -1 for newlines."""
    size = llava_next.PATCHES
    return [
        [-1 if each is None else each[0] * size + each[1] for each in picture.packed]
        for picture in prompt.pictures
    ]


def _of_video(prompt: Any) -> list[list[int]]:
    """Of a frame, [CLS] comes first."""
    size = video_llava.PATCHES
    return [
        list(range(size))
        if part.ndim == 3
        else [n for f in range(len(part)) for n in (-1, *range(f * size, (f + 1) * size))]
        for part in prompt.visual
    ]


LLAVA = Family(
    llava.tiny_llava,
    llava.prompts,
    llava.collate,
    lambda prompt: [list(range(llava.PATCHES)) for _ in prompt.images],
)
NEXT = Family(llava_next.tiny_llava_next, llava_next.prompts, llava_next.collate, _of_next)
VIDEO = Family(video_llava.tiny_video_llava, video_llava.prompts, video_llava.collate, _of_video)
FAMILIES = pytest.mark.parametrize(
    "family",
    [LLAVA, NEXT, VIDEO],
    ids=["llava", "llava-next", "video-llava"],
)
PLACEHOLDERS = (llava.IMAGE, video_llava.VIDEO)
WORDS = {"suppress_tokens": list(PLACEHOLDERS)}  # random weights would say them


@torch.no_grad()
def wanted(
    family: Family, batch: list[Any], inputs: dict[str, Tensor], text: Tensor
) -> list[list[Tensor]]:
    """For each step and image `(layers, tokens)`: eager maps of prompt and text, read in one go."""
    width = inputs["input_ids"].shape[1]
    ones = torch.ones_like(text)
    whole = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], text], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], ones], 1),
    }
    maps = family.build("eager")(**whole, output_attentions=True, use_cache=False).attentions
    stacked = torch.stack(maps, 1).mean(2)  # (batch, layers, slots, slots)
    steps = []
    for step in range(text.shape[1]):
        images = []
        for row, prompt in enumerate(batch):
            ids = inputs["input_ids"][row].tolist()
            slots = iter(n for n, each in enumerate(ids) if each in PLACEHOLDERS)
            for places in family.places(prompt):
                columns = [n for place, n in zip(places, slots) if place >= 0]  # noqa: B905
                real = inputs["attention_mask"][row].nonzero().max().item()
                query = real if step == 0 else width + step - 1
                images.append(stacked[row, :, query][:, columns])
        steps.append(images)
    return steps


def check(seen: Attended, expected: list[list[Tensor]]) -> None:
    assert seen.steps.shape[:3] == (len(expected), len(expected[0]), len(expected[0][0]))
    assert seen.steps.dtype == torch.float32
    for step, images in enumerate(expected):
        for image, rows in enumerate(images):
            got = seen.steps[step, image]
            torch.testing.assert_close(got[:, seen.mask[image]], rows, rtol=0, atol=2e-6)
            assert (got[:, ~seen.mask[image]] == 0).all()
            assert rows.std(1).min() > 1e-4  # there is something to rank


@FAMILIES
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [slice(0, 1), slice(1, 2), slice(0, 2), slice(None)], ids=str)
def test_steps_are_rows_of_the_eager_maps(family: Family, attention: str, rows: slice) -> None:
    """Alone and in left-padded batches, with several images and with prompts that have none."""
    model, batch = family.build(attention), family.prompts()[rows]
    inputs = family.collate(batch)
    with tokenprune.watch(model) as seen:
        text = llava.generate(model, inputs, STEPS, **WORDS).text
    check(seen, wanted(family, batch, inputs, text))
    every = [place for prompt in batch for place in family.places(prompt)]
    assert [[place for place in row if place >= 0] for row in seen.patches.tolist()] == [
        [place for place in row if place >= 0] for row in every
    ]


@FAMILIES
def test_watching_changes_nothing(family: Family) -> None:
    model, inputs = family.build(), family.collate(family.prompts())
    vanilla = llava.generate(model, inputs, STEPS)
    with tokenprune.watch(model):
        watched = llava.generate(model, inputs, STEPS)
    again = llava.generate(model, inputs, STEPS)
    for other in (watched, again):
        assert torch.equal(other.text, vanilla.text)
        assert torch.equal(other.logits, vanilla.logits)
    assert leftovers(model) == []
    assert "get_image_features" not in vars(model.model)
    assert "get_video_features" not in vars(model.model)


@FAMILIES
def test_beside_an_attachment_that_keeps_everything(family: Family) -> None:
    """Scores of a strategy and attention, of one pass, about the same patches in the same order."""
    model = family.build()
    batch = [p for p in family.prompts() if len(family.places(p)) == 1][:1]
    inputs = family.collate(batch)
    for stage in ("cls-attention | evict(1.0)", "fastv | evict(1.0) @ after-layer(2)"):
        for outer_first in (True, False):
            attachment = tokenprune.attach(model, stage)
            with tokenprune.watch(model) as seen:
                text = llava.generate(model, inputs, STEPS, **WORDS).text
                if outer_first:  # removed in the order of their making, too
                    attachment.detach()
            attachment.detach()
            check(seen, wanted(family, batch, inputs, text))
            reduction = attachment.last
            assert reduction.patches is not None
            assert torch.equal(reduction.patches, seen.patches)
            if stage.startswith("fastv"):
                assert reduction.scores is not None
                torch.testing.assert_close(seen.steps[0, :, 1], reduction.scores)
            assert leftovers(model) == []
            assert "get_image_features" not in vars(model.model)


class _Shapes(TorchFunctionMode):
    """Shapes of all results whose last two axes are squares of `side`."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.squares = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point():
            self.squares += out.shape[-2:] == (self.side, self.side)
        return out


def test_no_map_is_ever_made() -> None:
    """The widest thing that is computed is a row: sdpa stays, and no square of all slots."""
    model, inputs = LLAVA.build(), LLAVA.collate(LLAVA.prompts())
    side = inputs["input_ids"].shape[1]
    with tokenprune.watch(model), _Shapes(side) as shapes:
        llava.generate(model, inputs, STEPS)
    assert model.model.language_model.config._attn_implementation == "sdpa"
    assert shapes.squares == 0
    model.set_attn_implementation("eager")
    with _Shapes(side) as shapes:
        llava.generate(model, inputs, STEPS)
    assert shapes.squares > 0  # the check can fail


def test_right_padding_and_no_cache() -> None:
    model, batch = LLAVA.build(), LLAVA.prompts()
    inputs = llava.collate(batch, side="right", extra=2)
    for use_cache in (True, False):
        with tokenprune.watch(model) as seen, torch.no_grad():
            model(**inputs, use_cache=use_cache)
        check(seen, wanted(LLAVA, batch, inputs, torch.zeros(3, 1, dtype=torch.int64)))


def test_padding_is_no_key_where_the_kernel_gets_no_full_mask() -> None:
    """FlashAttention is told of padding only, so the rows are read without its help."""
    model, batch = LLAVA.build(), LLAVA.prompts()
    inputs = LLAVA.collate(batch)
    with flash_attention(model), tokenprune.watch(model) as seen:
        text = llava.generate(model, inputs, STEPS, **WORDS).text
    check(seen, wanted(LLAVA, batch, inputs, text))


@torch.no_grad()
def test_a_picture_after_a_text_that_is_cached() -> None:
    model, text = LLAVA.build(), torch.tensor([[llava.BOS, 41, 42]])
    row = llava.Row([43, llava.picture(1), 44])
    inputs = llava.collate([row])
    with tokenprune.watch(model) as seen:
        cache = model(input_ids=text).past_key_values
        ones = torch.ones(1, 3 + len(row.ids), dtype=torch.int64)
        model(**{**inputs, "attention_mask": ones}, past_key_values=cache)
        model(input_ids=torch.tensor([[45]]), past_key_values=cache)
    whole = llava.Row([llava.BOS, 41, 42, *row.parts])
    check(seen, wanted(LLAVA, [whole], llava.collate([whole]), torch.tensor([[45, 46]])))


def test_a_prompt_that_starts_with_its_picture() -> None:
    """Padding of a shorter picture is no patch, though the first slot of all is one."""
    wide, small = (llava_next.Picture.of(size, 1) for size in ((40, 90), (20, 25)))
    batch = [llava_next.Prompt([wide, 12, 13]), llava_next.Prompt([llava_next.BOS, small, 23])]
    model, inputs = NEXT.build(), NEXT.collate(batch)
    with tokenprune.watch(model) as seen:
        text = llava.generate(model, inputs, 2, **WORDS).text
    check(seen, wanted(NEXT, batch, inputs, text))


def test_the_latest_prompts_are_told() -> None:
    model, (one, _, none) = LLAVA.build(), LLAVA.prompts()
    with tokenprune.watch(model) as seen:
        with pytest.raises(MissingSignalError, match="no prompt with pictures has run"):
            _ = seen.steps
        llava.generate(model, LLAVA.collate([one, none]), 2)
        assert seen.steps.shape == (2, 1, 3, llava.PATCHES)
        llava.generate(model, LLAVA.collate([one, one]), 3)
        assert seen.steps.shape == (3, 2, 3, llava.PATCHES)
        llava.generate(model, LLAVA.collate([none]), 2)
        with pytest.raises(MissingSignalError, match="no prompt with pictures has run"):
            _ = seen.patches


@torch.no_grad()
def test_passes_of_the_language_model_alone_are_not_told() -> None:
    model, inputs = LLAVA.build(), LLAVA.collate(LLAVA.prompts())
    llm = model.model.language_model
    embeds = llm.get_input_embeddings()(inputs["input_ids"])
    stock = llm(inputs_embeds=embeds).last_hidden_state
    with tokenprune.watch(model) as seen:
        model(**inputs)
        told = seen.steps
        assert torch.equal(llm(inputs_embeds=embeds).last_hidden_state, stock)
    assert torch.equal(seen.steps, told)


def test_half_precision_rows_are_float32() -> None:
    model = LLAVA.build().to(torch.bfloat16)
    inputs = LLAVA.collate(LLAVA.prompts())
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with tokenprune.watch(model) as seen:
        llava.generate(model, inputs, 2)
    assert seen.steps.dtype == torch.float32
    assert all(row.unique().numel() == llava.PATCHES for row in seen.steps.flatten(0, 2))


def test_a_pass_that_fails_is_not_told() -> None:
    model, inputs = LLAVA.build(), LLAVA.collate(LLAVA.prompts())

    def fail(*_: object) -> None:
        raise RuntimeError("stop")

    with tokenprune.watch(model) as seen:
        handle = model.model.language_model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            model(**inputs)
        handle.remove()
        assert len(seen.steps) == 0
        llava.generate(model, inputs, 2)
        assert len(seen.steps) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt_lookup_num_tokens": 2, "max_matching_ngram_size": 1}, "candidates"),
        ({"cache_implementation": "static"}, "StaticLayer|static caches"),
    ],
    ids=["prompt lookup", "static cache"],
)
def test_generation_that_cannot_be_told_is_refused(options: dict[str, Any], words: str) -> None:
    repeats = llava.Row([llava.BOS, llava.picture(1), 5, 6, 5])
    model, inputs = LLAVA.build(), LLAVA.collate([repeats])
    with tokenprune.watch(model), pytest.raises(UnsupportedError, match=words):
        llava.generate(model, inputs, STEPS, eos_token_id=999, **options)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["4-D", "dict"])
def test_masks_that_do_not_tell_padding_are_refused(kind: str) -> None:
    model, inputs = LLAVA.build(), LLAVA.collate(LLAVA.prompts())
    width = inputs["input_ids"].shape[1]
    causal = torch.ones(3, 1, width, width, dtype=torch.bool).tril()
    inputs["attention_mask"] = causal if kind == "4-D" else {"full_attention": causal}
    got = r"\(3, 1, 41, 41\)" if kind == "4-D" else "dict"
    words = rf"must have axes \(batch tokens\) = \(3, 41\) to watch .* got {got}; static caches"
    with tokenprune.watch(model), pytest.raises(UnsupportedError, match=words):
        model(**inputs)


def test_prompts_that_were_shortened_are_refused() -> None:
    model = LLAVA.build()
    # Beside a longer text, the batch keeps its length.
    longer = [*LLAVA.prompts(), llava.Row([llava.BOS, *range(30, 80)])]
    for stage in ("cls-attention | evict(4)", "cls-attention | evict(4) @ after-layer(1)"):
        for batch in (LLAVA.prompts(), longer):
            with (
                tokenprune.attach(model, stage),
                tokenprune.watch(model),
                pytest.raises(AttachError, match="visual tokens were taken from this prompt"),
            ):
                llava.generate(model, LLAVA.collate(batch), 1)


@pytest.mark.parametrize("layer", [1, 2])
@torch.no_grad()
def test_prompts_that_are_shortened_by_a_later_hook_are_refused(layer: int) -> None:
    """Watched first, attached then: a layer is shortened after watching has looked at it."""
    model, inputs = LLAVA.build(), LLAVA.collate(LLAVA.prompts())
    with (
        tokenprune.watch(model),
        tokenprune.attach(model, f"fastv | evict(4) @ after-layer({layer})"),
        pytest.raises(AttachError, match="visual tokens were taken from this prompt"),
    ):
        model(**inputs)


def test_another_turn_is_refused() -> None:
    model, inputs = LLAVA.build(), LLAVA.collate(LLAVA.prompts()[:1])
    with tokenprune.watch(model), torch.no_grad():
        cache = model(**inputs).past_key_values
        with pytest.raises(UnsupportedError, match="start a new cache for another turn"):
            model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache)


def test_rows_that_were_repeated_are_refused() -> None:
    model = LLAVA.build()
    with tokenprune.watch(model), torch.no_grad():
        cache = model(**LLAVA.collate(LLAVA.prompts()[:1])).past_key_values
        cache.batch_repeat_interleave(2)
        with pytest.raises(UnsupportedError, match="2 rows continues 1 prompts"):
            model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)


def test_shapes_that_adapters_report_are_checked() -> None:
    seen = Attended()
    with pytest.raises(ShapeError, match=r"axes \(images tokens\), got \(3,\)"):
        seen.begin(torch.zeros(3, dtype=torch.int64))
    seen.begin(torch.tensor([[0, 1, 2], [0, 1, -1]]))
    assert seen.steps.shape == (0, 2, 0, 3)
    with pytest.raises(ShapeError, match=r"2 images of 3 tokens, got \(2, 5, 4\)"):
        seen.step(torch.rand(2, 5, 4))
    rows = torch.rand(2, 5, 4, 3)
    seen.step(rows)
    assert torch.equal(seen.steps[0, 0], rows[0].mean(1))
    assert (seen.steps[0, 1, :, 2] == 0).all()
