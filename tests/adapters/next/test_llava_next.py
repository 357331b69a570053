"""LLaVA-NeXT: crops, unpadding and newlines, against hand-packed embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokenprune
from support.llava_next import (
    PATCHES,
    SIZES,
    Picture,
    Prompt,
    collate,
    greedy,
    kept,
    prompts,
    tiny_llava_next,
)
from tokenprune import UnsupportedError
from tokenprune_adapters.hf.anyres import NEWLINE, Packing

STEPS = 4


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava_next()


def run(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> tuple[Any, torch.Tensor]:
    """New tokens and logits."""
    options = {"do_sample": False, "max_new_tokens": STEPS, "eos_token_id": None} | options
    output = model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **options)
    return output.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(output.logits, 1)


@pytest.mark.parametrize("size", SIZES)
def test_packing_is_what_the_description_says(model: Any, size: tuple[int, int]) -> None:
    picture = Picture.of(size, 0)
    packing = Packing.of(model.model, torch.tensor([size]), PATCHES)
    expected = [NEWLINE if t is None else t[0] * PATCHES + t[1] for t in picture.packed]
    assert packing.crops == (len(picture.crops),)
    assert packing.sources[0].tolist() == expected


@pytest.mark.parametrize("newline", ["keep", "drop"])
@pytest.mark.parametrize("per", ["image", "crop"])
@pytest.mark.parametrize("keep", [1, 7, 12])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generation_equals_hand_packed_embeddings(
    attention: str, keep: int, per: str, newline: str
) -> None:
    model = tiny_llava_next(attention)
    spec = f"cls-attention(layers=1) | evict({keep}, per={per!r}) @ before-llm(newline={newline!r})"
    with tokenprune.attach(model, spec):
        text, logits = run(model, collate(prompts()))
    for row, prompt in enumerate(prompts()):
        expected, oracle = greedy(model, prompt, keep, STEPS, per, newline)
        assert text[row].tolist() == expected
        torch.testing.assert_close(logits[row], oracle, atol=1e-5, rtol=0)


@pytest.mark.parametrize("newline", ["keep", "drop"])
def test_fastervlm_keeps_the_same_of_every_crop(model: Any, newline: str) -> None:
    """With ``newline='drop'`` newlines go as in the released code."""
    with tokenprune.attach(model, f"fastervlm(keep=5, newline={newline!r})"):
        text, logits = run(model, collate(prompts()))
    for row, prompt in enumerate(prompts()):
        expected, oracle = greedy(model, prompt, 5, STEPS, "crop", newline)
        assert text[row].tolist() == expected
        torch.testing.assert_close(logits[row], oracle, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_shapes_of_pictures(model: Any, size: tuple[int, int]) -> None:
    """Extreme aspect ratios, and pictures smaller than a crop."""
    prompt = Prompt([1, 11, Picture.of(size, 5), 12, 13])
    with tokenprune.attach(model, "cls-attention(layers=1) | evict(9)") as pruned:
        text, logits = run(model, collate([prompt]))
    expected, oracle = greedy(model, prompt, 9, STEPS)
    assert text[0].tolist() == expected
    torch.testing.assert_close(logits[0], oracle, atol=1e-5, rtol=0)
    patches = sum(token is not None for token in prompt.pictures[0].packed)
    assert [(i.before, i.after) for i in pruned.report.images] == [(patches, 9)]


@pytest.mark.parametrize("per", ["image", "crop"])
def test_keeping_everything_is_vanilla_to_the_bit(model: Any, per: str) -> None:
    inputs = collate(prompts())
    vanilla = run(model, inputs)
    with tokenprune.attach(model, f"cls-attention | evict(10000, per={per!r})"):
        everything = run(model, inputs)
    assert torch.equal(vanilla[0], everything[0])
    assert torch.equal(vanilla[1], everything[1])


def test_provenance_of_what_is_kept(model: Any) -> None:
    """Positions of the kept tokens are crop times patches plus patch."""
    inputs = collate(prompts())
    with tokenprune.attach(model, "cls-attention(layers=1) | evict(9)") as pruned:
        run(model, inputs)
    tokens = pruned.last.tokens
    pictures = [picture for prompt in prompts() for picture in prompt.pictures]
    for row, picture in enumerate(pictures):
        found = tokens.patches[row][tokens.mask[row]].tolist()
        assert {divmod(n, PATCHES) for n in found} == kept(model, picture, 9, "image")


@pytest.mark.parametrize("per", ["image", "crop"])
def test_the_report_tells_picture_crop_and_patch(model: Any, per: str) -> None:
    """One entry for each picture, whatever a budget is for."""
    with tokenprune.attach(model, f"cls-attention(layers=1) | evict(5, per={per!r})") as pruned:
        run(model, collate(prompts()))
    pictures = [picture for prompt in prompts() for picture in prompt.pictures]
    report = pruned.report
    assert [(left.kind, left.number) for left in report.kept] == [("image", n) for n in range(3)]
    for picture, image, left in zip(pictures, report.images, report.kept, strict=True):
        wanted = kept(model, picture, 5, per)
        assert sorted(zip(left.crop, left.patch, strict=True)) == sorted(wanted)
        for crop in range(len(picture.crops)):
            assert sorted(left.of(crop)) == sorted(patch for c, patch in wanted if c == crop)
        patches = sum(token is not None for token in picture.packed)
        assert (image.before, image.after) == (patches, len(wanted))
    assert {origin.number for origin in pruned.last.origins} == {0, 1, 2}


def test_kv_cache_holds_kept_patches_newlines_and_text(model: Any) -> None:
    inputs = collate(prompts())
    with tokenprune.attach(model, "cls-attention | evict(5)"):
        cache = model(**inputs, use_cache=True).past_key_values
    lengths = []
    for prompt in prompts():
        newlines = sum(token is None for p in prompt.pictures for token in p.packed)
        text = sum(not isinstance(part, Picture) for part in prompt.parts)
        lengths.append(5 * len(prompt.pictures) + newlines + text)
    assert {layer.keys.shape[2] for layer in cache.layers} == {max(lengths)}
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]


def test_batch_equals_single_with_beams(model: Any) -> None:
    beams = {"num_beams": 3, "max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None}
    with tokenprune.attach(model, "cls-attention | evict(6)"):
        inputs = collate(prompts())
        batch = model.generate(**inputs, **beams)[:, inputs["input_ids"].shape[1] :]
        for row, prompt in enumerate(prompts()):
            alone = collate([prompt])
            single = model.generate(**alone, **beams)[0, alone["input_ids"].shape[1] :]
            assert batch[row].tolist() == single.tolist()


def test_second_turn_continues_the_pruned_prompt(model: Any) -> None:
    prompt = prompts()[1]
    more = Prompt([*prompt.parts, 41, 42, 43])
    with tokenprune.attach(model, "cls-attention(layers=1) | evict(6)"):
        first = model(**collate([prompt]), use_cache=True)
        inputs = collate([more])
        seen = first.past_key_values.get_seq_length()
        second = model(
            input_ids=inputs["input_ids"][:, seen:],
            attention_mask=inputs["attention_mask"],
            past_key_values=first.past_key_values,
        )
    _, oracle = greedy(model, more, 6, 1)
    torch.testing.assert_close(second.logits[0, -1], oracle[0], atol=1e-5, rtol=0)


def test_merging_before_the_projector(model: Any) -> None:
    """Merged tokens enter where the smallest of their members was."""
    inputs = collate(prompts())
    with tokenprune.attach(model, "tome(10)") as pruned:
        _, logits = run(model, inputs)
    assert [image.after for image in pruned.report.images] == [10, 10, 10]
    assert logits.isfinite().all()


def test_detaching_restores_the_method_and_the_outputs(model: Any) -> None:
    inputs = collate(prompts())
    before = model(**inputs).logits
    names = set(vars(model.model))
    with tokenprune.attach(model, "cls-attention | evict(5)"):
        assert "get_image_features" in vars(model.model)
        assert not torch.equal(model(**inputs).logits, before)
    assert set(vars(model.model)) == names
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("cls-attention | evict(5, per='frame')", "has no frames"),
        ("cls-attention | evict(5, per='crop') | tome(3)", "must share per"),
        ("prumerge(5, per='frame')", "has no frames"),
        ("prumerge(5, per='crop') | tome(3)", "must share per"),
    ],
)
def test_refusals(model: Any, spec: str, words: str) -> None:
    with pytest.raises(tokenprune.UnsupportedError, match=words):
        tokenprune.attach(model, spec)
    assert "get_image_features" not in vars(model.model)


@pytest.mark.parametrize("name", ["prumerge", "prumerge-plus"])
def test_budgets_of_prumerge_are_for_what_they_say(model: Any, name: str) -> None:
    """Budgets of all reducers alike: once these were taken to be for the picture, whatever."""
    crops = [len(picture.crops) for prompt in prompts() for picture in prompt.pictures]
    for per, wanted in (("crop", [3 * each for each in crops]), ("image", [3] * len(crops))):
        with tokenprune.attach(model, f"{name}(3, per={per!r})") as pruned:
            model(**collate(prompts()))
            assert [image.after for image in pruned.report.images] == wanted
    assert sum(crops) > len(crops)


def test_a_method_that_somebody_replaced_is_refused(model: Any) -> None:
    core = model.model
    core.get_image_features = core.get_image_features
    try:
        with pytest.raises(tokenprune.AttachError, match="somebody else has replaced"):
            tokenprune.attach(model, "cls-attention | evict(5)")
    finally:
        del core.__dict__["get_image_features"]


def test_a_model_that_packs_in_another_way_is_refused_when_attaching() -> None:
    model: Any = tiny_llava_next()
    spec = "cls-attention | evict(4) @ before-llm"

    def pack_image_features(features: Any, sizes: Any, how: Any, newline: Any) -> None: ...

    model.model.pack_image_features = pack_image_features
    with pytest.raises(UnsupportedError, match="pack_image_features does not take image_sizes, v"):
        tokenprune.attach(model, spec)
    model.model.pack_image_features = None
    with pytest.raises(UnsupportedError, match="LlavaNextModel has no pack_image_features; found"):
        tokenprune.attach(model, spec)


def test_a_list_of_tensors_is_refused_in_words(model: Any) -> None:
    """The model takes one tensor, too; but says so by an attribute that a list lacks."""
    inputs = dict(collate(prompts()))
    inputs["pixel_values"] = list(inputs["pixel_values"])
    with (
        tokenprune.attach(model, "random | evict(4)"),
        pytest.raises(UnsupportedError, match="a list of .* for pixel_values; pass one tensor"),
    ):
        model(**inputs)
