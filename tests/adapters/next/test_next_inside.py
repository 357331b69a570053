"""LLaVA-NeXT with stages after layers, against a reader that packs and recomputes by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import tokenprune
from support.inside_oracle import Cut, evict, say
from support.llava import IMAGE, Answer, generate
from support.llava_next import SIZES, Picture, Prompt, collate, prompts, tiny_llava_next
from support.next_inside import RecomputePacked

STEPS = 4
NAMES = {"last": "fastv", "text": "fastv(queries='text')", "cls": "cls-attention(layers=1)"}
POSITIONS = pytest.mark.parametrize("positions", ["original", "reindexed"])


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava_next()


def stage(layer: int, keep: int, by: str, positions: str = "original") -> str:
    return f"{NAMES[by]} | evict({keep}) @ after-layer({layer}, positions={positions!r})"


def expected(
    model: Any, batch: list[Prompt], cuts: list[Cut], steps: int = STEPS, **options: Any
) -> tuple[Tensor, Tensor]:
    return say([RecomputePacked(model, row, cuts, **options) for row in batch], steps)


def check(answer: Answer, wanted: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(answer.text, wanted[0])
    torch.testing.assert_close(answer.logits, wanted[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@POSITIONS
@pytest.mark.parametrize("by", ["last", "text", "cls"])
@pytest.mark.parametrize(("layer", "keep"), [(1, 1), (2, 7)])
def test_one_stage(attention: str, positions: str, by: str, layer: int, keep: int) -> None:
    model = tiny_llava_next(attention)
    wanted = expected(model, prompts(), [Cut(layer, evict(keep, by), positions)])
    with tokenprune.attach(model, stage(layer, keep, by, positions)):
        check(generate(model, collate(prompts()), STEPS), wanted)


@pytest.mark.parametrize("newline", ["keep", "drop"])
@POSITIONS
@pytest.mark.parametrize("by", ["last", "cls"])
def test_before_and_inside(model: Any, newline: str, positions: str, by: str) -> None:
    """The first stage decides which patches the others see, and what becomes of newlines."""
    cuts = [Cut(1, evict(8, by), positions), Cut(2, evict(3, "cls"), positions)]
    wanted = expected(model, prompts(), cuts, before=12, newline=newline)
    first = f"{NAMES['cls']} | evict(12) @ before-llm(newline={newline!r})"
    stages = [first, stage(1, 8, by, positions), stage(2, 3, "cls", positions)]
    with tokenprune.attach(model, *stages) as pruned:
        check(generate(model, collate(prompts()), STEPS), wanted)
    patches = [sum(t is not None for t in p.packed) for row in prompts() for p in row.pictures]
    images = [(image.before, image.after) for image in pruned.report.images]
    assert images == [(before, 3) for before in patches]
    assert pruned.report.layers == ((0, 36), (1, 24), (2, 9))


def test_the_oracle_has_teeth(model: Any) -> None:
    usual = expected(model, prompts(), [Cut(2, evict(4, "last"))], steps=1)[1][:2, 0]
    for others in (
        expected(model, prompts(), [Cut(2, evict(5, "last"))], steps=1),
        expected(model, prompts(), [Cut(1, evict(4, "last"))], steps=1),
        expected(model, prompts(), [Cut(2, evict(4, "text"))], steps=1),
        expected(model, prompts(), [Cut(2, evict(4, "cls"))], steps=1),
        expected(model, prompts(), [Cut(2, evict(4, "last"), "reindexed")], steps=1),
        expected(model, prompts(), [Cut(2, evict(4, "last"))], steps=1, newline="drop"),
        expected(model, prompts(), [], steps=1),
    ):
        assert (others[1][:2, 0] - usual).abs().amax(1).min() > 0.01


@pytest.mark.parametrize("size", SIZES)
def test_shapes_of_pictures(model: Any, size: tuple[int, int]) -> None:
    """Extreme aspect ratios, and pictures smaller than a crop."""
    row = Prompt([1, 11, Picture.of(size, 5), 12, 13])
    wanted = expected(model, [row], [Cut(1, evict(9, "last"))])
    with tokenprune.attach(model, stage(1, 9, "last")):
        check(generate(model, collate([row]), STEPS), wanted)


@pytest.mark.parametrize("spec", [stage(1, 10**4, "last"), stage(9, 1, "last")])
def test_keeping_everything_is_vanilla_to_the_bit(model: Any, spec: str) -> None:
    inputs = collate(prompts())
    vanilla = generate(model, inputs, STEPS)
    with tokenprune.attach(model, spec):
        everything = generate(model, inputs, STEPS)
    assert torch.equal(vanilla.text, everything.text)
    assert torch.equal(vanilla.logits, everything.logits)


def test_caches_hold_newlines_in_every_layer(model: Any) -> None:
    with tokenprune.attach(model, stage(2, 5, "last")):
        cache = model(**collate(prompts()), use_cache=True).past_key_values
    whole = max(len(row.ids) for row in prompts())
    short = max(
        sum(not isinstance(part, Picture) for part in row.parts)
        + sum(5 + sum(token is None for token in p.packed) for p in row.pictures)
        for row in prompts()
    )
    assert [layer.keys.shape[2] for layer in cache.layers] == [whole, whole, short]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_batches_in_any_order_equal_singles(model: Any, order: list[int]) -> None:
    rows = [prompts()[n] for n in order]
    with tokenprune.attach(model, stage(1, 6, "cls"), stage(2, 2, "last")):
        batch = generate(model, collate(rows), STEPS)
        for number, row in enumerate(rows):
            alone = generate(model, collate([row]), STEPS)
            assert torch.equal(batch.text[number], alone.text[0])
            torch.testing.assert_close(batch.logits[number], alone.logits[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "top_k": 5}])
def test_beams_and_sampling(model: Any, options: dict[str, Any]) -> None:
    """As for the same prompts one at a time; images are regrouped for the copies of a prompt."""
    options = {"max_new_tokens": STEPS, "eos_token_id": None, "do_sample": False, **options}
    # Without a cache `fastv` asks the newest token at every step, and other tokens may stay.
    by = "last" if "num_beams" in options else "cls"
    with tokenprune.attach(model, stage(1, 6, "cls"), stage(2, 2, by)):
        if "num_beams" in options:
            inputs = collate(prompts())
            batch = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
            for number, row in enumerate(prompts()):
                alone = collate([row])
                single = model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :]
                assert torch.equal(batch[number], single)
            return
        row = collate([prompts()[1]])
        torch.manual_seed(3)
        cached = model.generate(**row, **options, num_return_sequences=3)
        torch.manual_seed(3)
        plain = model.generate(**row, **options, num_return_sequences=3, use_cache=False)
        assert torch.equal(cached, plain)


@POSITIONS
def test_second_turn_with_another_picture(model: Any, positions: str) -> None:
    first, second = prompts()[1], [41, Picture.of((60, 60), 9), 42, 43]
    more = Prompt([*first.parts, *second])
    cuts = [Cut(1, evict(6, "last"), positions)]
    reader = RecomputePacked(model, first, cuts)
    wanted = [reader.logits([])]
    reader.extend(second)
    wanted.append(reader.logits([]))
    with tokenprune.attach(model, stage(1, 6, "last", positions)):
        cache = DynamicCache(config=model.config.text_config)
        got = [model(**collate([first]), past_key_values=cache).logits[0, -1]]
        seen = cache.get_seq_length()
        turn = collate([Prompt(second)])
        inputs = collate([more])
        again = model(
            input_ids=inputs["input_ids"][:, seen:],
            attention_mask=inputs["attention_mask"],
            pixel_values=turn["pixel_values"],
            image_sizes=turn["image_sizes"],
            past_key_values=cache,
        )
        got.append(again.logits[0, -1])
    torch.testing.assert_close(torch.stack(got), torch.stack(wanted), rtol=0, atol=1e-5)


def test_merging_inside(model: Any) -> None:
    inputs = collate(prompts())
    with tokenprune.attach(model, "tome(6) @ after-layer(1)") as pruned:
        answer = generate(model, inputs, STEPS)
        assert [image.after for image in pruned.report.images] == [6, 6, 6]
        plain = model(**inputs, use_cache=False).logits[:, -1]
    assert answer.logits.isfinite().all()
    torch.testing.assert_close(answer.logits[:, 0], plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "recipe", ["vtw(layer=2)", "pyramiddrop(first=1, second=2, third=3)", "fastv(keep=5)"]
)
def test_recipes(model: Any, recipe: str) -> None:
    inputs = collate(prompts())
    vanilla = generate(model, inputs, STEPS)
    with tokenprune.attach(model, recipe):
        answer = generate(model, inputs, STEPS)
    assert not torch.equal(answer.logits[:2], vanilla.logits[:2])
    torch.testing.assert_close(answer.logits[2], vanilla.logits[2], rtol=0, atol=1e-5)


def test_provenance_of_what_is_kept_inside(model: Any) -> None:
    """Positions are crop times patches plus patch, in every stage."""
    with tokenprune.attach(model, stage(1, 9, "cls")) as pruned:
        generate(model, collate(prompts()), 1)
    tokens = pruned.last.tokens
    readers = [RecomputePacked(model, row, [Cut(1, evict(9, "cls"))]) for row in prompts()]
    pictures = [picture for row in prompts() for picture in row.pictures]
    decided = []
    for reader in readers:
        reader.logits([])
        for _, (members, weights) in sorted(reader.decided.items()):
            images = [reader.images[n] for n in members]
            first = reader.images.index(images[0])
            decided.append([members[n] - first for n in weights.argmax(1).tolist()])
    for row, (picture, slots) in enumerate(zip(pictures, decided, strict=True)):
        found = tokens.patches[row][tokens.mask[row]].tolist()
        assert [divmod(n, 16) for n in found] == [picture.packed[slot] for slot in slots]
        left = pruned.report.kept[row]
        assert list(zip(left.crop, left.patch, strict=True)) == [picture.packed[n] for n in slots]


def test_beams_are_no_pictures_inside(model: Any) -> None:
    reports = []
    for beams in (1, 3):
        with tokenprune.attach(model, stage(1, 9, "last")) as pruned:
            generate(model, collate(prompts()), 2, num_beams=beams)
        reports.append(pruned.report)
    assert reports[0].images == reports[1].images
    assert reports[0].kept == reports[1].kept
    assert (len(reports[1].images), reports[1].tokens_after) == (3, 27)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (["fastv | evict(3, per='crop') @ after-layer(1)"], "crops are packed into one sequence"),
        (
            ["random | evict(3, per='crop')", "fastv | evict(3) @ after-layer(1)"],
            "cannot be combined with stages after a layer",
        ),
    ],
)
def test_refusals(model: Any, stages: list[str], words: str) -> None:
    with pytest.raises(tokenprune.UnsupportedError, match=words):
        tokenprune.attach(model, *stages)
    assert "get_image_features" not in vars(model.model)


def test_encoding_by_hand_works_in_both_forms(model: Any) -> None:
    inputs = collate(prompts()[:1])
    given = inputs["pixel_values"], inputs["image_sizes"]
    with tokenprune.attach(model, stage(1, 3, "last")):
        made = model.model.get_image_features(*given, return_dict=True)
        plain = model.model.get_image_features(*given, return_dict=False)
    assert any(each is not None and torch.equal(each[0], made.pooler_output[0]) for each in plain)


def test_features_of_unknown_origin_are_refused(model: Any) -> None:
    inputs = collate(prompts()[:1])
    pixels, sizes = inputs.pop("pixel_values"), inputs.pop("image_sizes")
    features = model.model.get_image_features(pixels, sizes, return_dict=True)
    with (
        tokenprune.attach(model, stage(1, 3, "last")),
        pytest.raises(tokenprune.MissingSignalError, match="did not come from the attached model"),
    ):
        model(**inputs, mm_encoder_outputs={"image": features})


def test_a_placeholder_too_many_is_the_models_own_complaint(model: Any) -> None:
    inputs = collate(prompts())
    row, slot = (inputs["input_ids"] == IMAGE).nonzero()[-1].tolist()
    inputs["input_ids"][row, slot + 1] = IMAGE
    refused = pytest.raises(ValueError, match="Image features and image tokens do not match")
    with tokenprune.attach(model, stage(1, 4, "last")), refused:
        model(**inputs)
