"""Video-LLaVA with stages after layers of the LLM, against vanilla layers on the same tokens.

Batches are ragged and left padded: a picture; two videos next to each other; text only; a video
between two pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune
from support.flash import flash_attention
from support.inside_oracle import Cut, evict, say
from support.llava import BOS, Answer, generate, picture
from support.video_inside import RecomputeVideos, greedy
from support.video_llava import (
    FRAMES,
    PATCHES,
    VIDEO,
    Row,
    collate,
    prompts,
    tiny_video_llava,
    video,
)
from tokenprune import MissingSignalError, UnsupportedError
from tokenprune_adapters.hf.chunked_prefill import VERSION

STEPS = 5
POSITIONS = pytest.mark.parametrize("positions", ["original", "reindexed"])
PER = pytest.mark.parametrize("per", ["image", "frame"])
SCORERS = {"last": "fastv", "text": "fastv(queries='text')", "cls": "cls-attention"}
ALL_RECIPES = [
    "vtc-cls(keep=6)",
    "fastervlm",
    "random(keep=6)",
    "uniform(keep=6)",
    "tome(keep=6)",
    "kmeans(keep=6)",
    "prumerge",
    "prumerge-plus(keep=6)",
    "vispruner(keep=6)",
    "visionzip(keep=6)",
    "divprune(keep=6)",
    "fopru",
    "fopru(mode='row')",
    "pool(6)",
    "fastv",
    "vtc-cls-in-llm(keep=6)",
    "vtw(layer=2)",
    "pyramiddrop(first=1, second=2, third=3)",
]
_shared = lru_cache(tiny_video_llava)


@pytest.fixture
def make() -> Iterator[Callable[..., Any]]:
    """Tiny models, shared by tests with equal arguments."""
    used: list[Any] = []

    def made(attention: str = "sdpa") -> Any:
        used.append(_shared(attention))
        return used[-1]

    yield made
    for model in used:
        assert not [name for name in vars(model.model) if name.startswith("get_")]


@pytest.fixture
def model(make: Callable[..., Any]) -> Any:
    return make()


def spec(
    keep: int | float,
    layer: int = 2,
    by: str = "last",
    per: str = "image",
    positions: str = "original",
) -> str:
    place = f"after-layer({layer}, positions={positions!r})"
    return f"{SCORERS[by]} | evict({keep}, per={per!r}) @ {place}"


def before(keep: int, per: str = "image", positions: str = "reindexed") -> str:
    place = f"before-llm(positions={positions!r})"
    return f"cls-attention | evict({keep}, per={per!r}) @ {place}"


def reduced(
    model: Any, *stages: str, batch: list[Row] | None = None, steps: int = STEPS, **options: Any
) -> Answer:
    with tokenprune.attach(model, *stages):
        return generate(model, collate(batch or prompts()), steps, **options)


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def check(answer: Answer, wanted: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(answer.text, wanted[0])
    close(answer.logits, wanted[1])


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash"])
@PER
@POSITIONS
@pytest.mark.parametrize("first", [None, 10])
@pytest.mark.parametrize(("layer", "keep", "by"), [(1, 4, "last"), (2, 9, "cls"), (2, 1, "text")])
def test_greedy_equals_the_oracle(
    make: Callable[..., Any],
    attention: str,
    per: str,
    positions: str,
    first: int | None,
    layer: int,
    keep: int,
    by: str,
) -> None:
    flash = attention == "flash"
    model = make("sdpa" if flash else attention)
    cuts = [Cut(layer, evict(keep, by), positions)]
    wanted = greedy(model, prompts(), cuts, per, before=first)
    stages = [spec(keep, layer, by, per, positions), *([before(first, per)] if first else [])]
    with flash_attention(model) if flash else nullcontext():
        answer = reduced(model, *stages)
    check(answer, wanted)


def test_the_oracle_has_teeth(model: Any) -> None:
    """What a row is, and who asks, matters in the prompts with videos."""

    def first_logits(by: str, per: str, **options: Any) -> Tensor:
        cuts = [Cut(2, evict(4, by))]
        return greedy(model, prompts(), cuts, per, steps=1, **options)[1][[1, 3], 0]

    usual = first_logits("text", "image")
    for others in (
        first_logits("text", "frame"),
        first_logits("last", "image"),
        first_logits("cls", "image"),
        first_logits("text", "image", before=10),
    ):
        assert (others - usual).abs().amax(1).min() > 0.05


@PER
@POSITIONS
@pytest.mark.parametrize("scorers", [("last", "cls"), ("cls", "text")])
@pytest.mark.parametrize("first", [None, 12])
def test_several_stages(
    model: Any, per: str, positions: str, scorers: tuple[str, str], first: int | None
) -> None:
    """Later stages see the tokens, and the towers' signals, that earlier ones left."""
    one, two = scorers
    cuts = [Cut(1, evict(8, one), positions), Cut(2, evict(3, two), positions)]
    wanted = greedy(model, prompts(), cuts, per, before=first)
    stages = [spec(3, 2, two, per, positions), spec(8, 1, one, per, positions)]
    answer = reduced(model, *([before(first, per)] if first else []), *stages)
    check(answer, wanted)
    for layer, keep in zip(answer.cache.layers, (first or 10**6, 8, 3), strict=True):
        longest = 0
        for row in prompts():
            gone = 0
            for part in row.visual:
                rows = part.shape[0] if part.ndim == 4 and per == "frame" else 1
                each = PATCHES * (part.shape[0] if part.ndim == 4 and per == "image" else 1)
                gone += rows * max(each - keep, 0)
            longest = max(longest, len(row.ids) - gone)
        assert layer.keys.shape[2] == longest + STEPS - 1


@PER
def test_withdrawing_all_patches_leaves_cls_of_frames(model: Any, per: str) -> None:
    wanted = greedy(model, prompts(), [Cut(2, evict(0))], per)
    answer = reduced(model, spec(0, 2, "last", per))
    check(answer, wanted)
    text = max(
        len(row.ids) - sum(PATCHES * part[..., 0, 0, 0].numel() for part in row.visual)
        for row in prompts()
    )
    assert answer.cache.layers[2].keys.shape[2] == text + STEPS - 1
    check(reduced(model, spec(0, 1), spec(5, 2)), greedy(model, prompts(), [Cut(1, evict(0))], per))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@PER
@POSITIONS
@pytest.mark.parametrize("stages", [[(48, 2)], [(10**6, 1)], [(4, 3)], [(48, 1), (50, 2)]])
def test_keeping_everything_or_starting_too_late_is_vanilla_bit_for_bit(
    make: Callable[..., Any],
    attention: str,
    per: str,
    positions: str,
    stages: list[tuple[int, int]],
) -> None:
    model = make(attention)
    vanilla = generate(model, collate(prompts()), STEPS)
    for by in ("last", "cls"):
        answer = reduced(model, *(spec(keep, layer, by, per, positions) for keep, layer in stages))
        assert torch.equal(answer.text, vanilla.text)
        assert torch.equal(answer.logits, vanilla.logits)


@PER
@pytest.mark.parametrize("by", SCORERS)
@pytest.mark.parametrize("options", [{"num_beams": 3}, {}], ids=["beams", "greedy"])
def test_a_batch_equals_its_rows_alone(
    model: Any, per: str, by: str, options: dict[str, Any]
) -> None:
    stages = [before(12, per), spec(4, 1, by, per)]
    together = reduced(model, *stages, **options)
    for row, prompt in enumerate(prompts()):
        alone = reduced(model, *stages, batch=[prompt], **options)
        assert torch.equal(alone.text[0], together.text[row])
        if not options:
            close(alone.logits[0], together.logits[row])


@pytest.mark.parametrize(
    "stages",
    [
        ["random | evict(4, per='frame') @ after-layer(1)"],
        [before(9, "frame"), spec(4, 1, "cls", "frame")],
        ["tome(6, per='frame')", "tome(3, per='frame') @ after-layer(1)"],
    ],
    ids=["random", "evict", "tome"],
)
def test_many_frames_do_not_make_the_pictures_of_their_batch_forgotten(
    model: Any, stages: list[str]
) -> None:
    """Pictures are encoded first, and what is known of them is asked for after 65 frames."""
    batch = [Row([BOS, picture(1), 5, 6]), *(Row([BOS, video(n, 13), 7]) for n in range(5))]
    together = reduced(model, *stages, batch=batch, steps=1)
    for row in (0, 5):
        alone = reduced(model, *stages, batch=[batch[row]], steps=1)
        close(alone.logits[0], together.logits[row])


@PER
def test_sampling_follows_the_oracle(model: Any, per: str) -> None:
    def choose(logits: Tensor) -> Tensor:
        return torch.multinomial((logits / 1.5).softmax(-1), 1)[:, 0]

    options = {"do_sample": True, "num_return_sequences": 2, "temperature": 1.5, "top_k": 0}
    torch.manual_seed(7)
    answer = reduced(model, spec(4, per=per, by="cls"), **options)
    torch.manual_seed(7)
    batch = [row for row in prompts() for _ in range(2)]
    readers = [RecomputeVideos(model, row, [Cut(2, evict(4, "cls"))], per) for row in batch]
    text, logits = say(readers, STEPS, choose)  # type: ignore[arg-type]
    assert torch.equal(answer.text, text)
    close(answer.logits, logits)


TURN = [[51, video(7), 52], [53, picture(8), 54], [55, 56, 57, video(9)], [58, 59]]


@PER
@POSITIONS
@pytest.mark.parametrize("first", [None, 10])
def test_a_second_turn(model: Any, per: str, positions: str, first: int | None) -> None:
    """More videos and pictures come along; what is new is reduced, what is cached stays."""
    cuts = [Cut(1, evict(9, "cls"), positions), Cut(2, evict(4), positions)]
    stages = [spec(9, 1, "cls", per, positions), spec(4, 2, "last", per, positions)]
    stages += [before(first, per)] if first else []
    inputs, new = collate(prompts()), collate([Row(list(each)) for each in TURN])
    with tokenprune.attach(model, *stages):
        one = generate(model, inputs, STEPS)
        ids = [inputs["input_ids"], one.text, new["input_ids"]]
        mask = [inputs["attention_mask"], torch.ones_like(one.text), new["attention_mask"]]
        new |= {"input_ids": torch.cat(ids, 1), "attention_mask": torch.cat(mask, 1)}
        two = generate(model, new, STEPS, past_key_values=one.cache)
    readers = [RecomputeVideos(model, row, cuts, per, before=first) for row in prompts()]
    check(one, say(list(readers), STEPS))
    for reader, text, more in zip(readers, one.text.tolist(), TURN, strict=True):
        reader.extend([*text, *more])
    check(two, say(list(readers), STEPS))


@torch.no_grad()
@PER
def test_forward_by_itself(model: Any, per: str) -> None:
    """Where the model encodes pixels in `forward`, under each name that pictures have."""
    wanted = greedy(model, prompts(), [Cut(1, evict(5))], per, steps=1)[1][:, 0]
    inputs = collate(prompts())
    with tokenprune.attach(model, spec(5, 1, per=per)):
        close(model(**inputs).logits[:, -1], wanted)
        close(model(**inputs, use_cache=False).logits[:, -1], wanted)
        if VERSION >= (5, 23):
            inputs["pixel_values"] = inputs.pop("pixel_values_images")
            close(model(**inputs).logits[:, -1], wanted)


def test_what_strategies_see(model: Any) -> None:
    """Hidden states that enter the layer, places counted over frames, and no [CLS]."""
    seen = []

    class Look(tokenprune.Scorer):
        def score(self, tokens: Any, signals: Any) -> Tensor:
            seen.append(tokens)
            return tokens.patches.float()

    prompt = prompts()[3]
    inputs = collate([prompt])
    strategy = tokenprune.Strategy(Look(), tokenprune.Evict(6))
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    with tokenprune.attach(model, strategy.at(tokenprune.AfterLayer(1))), torch.no_grad():
        model(**inputs)
    (tokens,) = seen
    assert tokens.lengths == (PATCHES, FRAMES * PATCHES, PATCHES)
    assert tokens.patches[1].tolist() == list(range(FRAMES * PATCHES))
    assert tokens.patches[0, :PATCHES].tolist() == list(range(PATCHES))
    start = prompt.ids.index(VIDEO)
    slots = [
        start + frame * (PATCHES + 1) + 1 + patch
        for frame in range(FRAMES)
        for patch in range(PATCHES)
    ]
    close(tokens.features[1], states[1][0, slots])
    assert len(set(tokens.ids.tolist())) == 3


@PER
def test_the_report_counts_pictures_and_then_videos(model: Any, per: str) -> None:
    """As before the LLM, whatever their order in the prompts."""
    with tokenprune.attach(model, before(10, per), spec(4, 1, per=per)) as attachment:
        generate(model, collate(prompts()), 2)
        report = attachment.report
    frames = 1 if per == "image" else FRAMES  # that have a budget of their own
    images = [(PATCHES, 4)] * 3 + [(FRAMES * PATCHES, 4 * frames)] * 3
    assert [(image.before, image.after) for image in report.images] == images
    assert report.calls == 1
    assert report.layers == ((0, 10 * (3 + 3 * frames)), (1, 4 * (3 + 3 * frames)))


@PER
@pytest.mark.parametrize("options", [{"num_beams": 3}, {}], ids=["beams", "greedy"])
def test_one_order_and_one_entry_each_before_and_inside(
    model: Any, per: str, options: dict[str, Any]
) -> None:
    """By [CLS] attention, a stage keeps the same patches at both places, and reports the same."""
    reports, rows = [], []
    stages = (f"cls-attention | evict(4, per={per!r})", spec(4, 1, "cls", per))
    for stage in stages:
        with tokenprune.attach(model, stage) as attachment:
            generate(model, collate(prompts()), 2, **options)
        reports.append(attachment.report)
        rows.append(attachment.last)
    assert len(reports[0].kept) == len(reports[0].images) == 6
    assert reports[0].kept == reports[1].kept
    assert reports[0].images == reports[1].images
    assert rows[0].origins == rows[1].origins
    assert torch.equal(rows[0].plan.anchors, rows[1].plan.anchors)
    assert torch.equal(rows[0].tokens.patches, rows[1].tokens.patches)


def test_frames_of_videos_that_were_encoded_elsewhere_are_videos_of_their_own(model: Any) -> None:
    inputs = collate(prompts()[1:2])
    with torch.no_grad():
        encoded = model.model.get_video_features(inputs.pop("pixel_values_videos"))
        with tokenprune.attach(model, spec(4, per="frame")) as attachment:
            model(**inputs, mm_encoder_outputs={"video": encoded})
    kept = attachment.report.kept
    assert [(left.kind, left.number) for left in kept] == [("video", n) for n in range(2 * FRAMES)]
    assert all(set(left.frame) == {0} for left in kept)


def test_merging_inside_never_takes_cls(model: Any) -> None:
    """Every row keeps what it may, in the batch as alone; nothing of another row is mixed in."""
    stage = "tome(7) @ after-layer(1)"
    with tokenprune.attach(model, stage) as attachment:
        together = generate(model, collate(prompts()), STEPS)
        assert [image.after for image in attachment.report.images] == [7] * 6
    for row, prompt in enumerate(prompts()):
        close(reduced(model, stage, batch=[prompt]).logits[0], together.logits[row])


@PER
@torch.no_grad()
def test_features_that_were_encoded_by_hand(model: Any, per: str) -> None:
    wanted = greedy(model, prompts()[1:2], [Cut(2, evict(4, "cls"))], per, steps=1)[1][:, 0]
    inputs = collate(prompts()[1:2])
    pixels = inputs.pop("pixel_values_videos")
    with tokenprune.attach(model, spec(4, by="cls", per=per)):
        encoded = model.model.get_video_features(pixels)
        close(model(**inputs, mm_encoder_outputs={"video": encoded}).logits[:, -1], wanted)
        first, *_ = model.model.get_video_features(pixels, return_dict=False)
        assert torch.equal(first, encoded.last_hidden_state)


def test_features_that_were_encoded_elsewhere(model: Any) -> None:
    """Frames of a video are then unknown; per frame there is nothing to know."""
    inputs = collate(prompts()[1:2])
    with torch.no_grad():
        encoded = model.model.get_video_features(inputs.pop("pixel_values_videos"))
    inputs["mm_encoder_outputs"] = {"video": encoded}
    with (
        tokenprune.attach(model, spec(4)),
        pytest.raises(UnsupportedError, match="not known how many frames.*or per='frame'"),
    ):
        model(**inputs)
    with torch.no_grad(), tokenprune.attach(model, spec(4, per="frame")):
        got = model(**inputs).logits[:, -1]
    close(got, greedy(model, prompts()[1:2], [Cut(2, evict(4))], "frame", steps=1)[1][:, 0])
    with (
        tokenprune.attach(model, spec(4, per="frame", by="cls")),
        pytest.raises(MissingSignalError, match="did not come from the attached vision tower"),
    ):
        model(**inputs)


def test_prompt_lookup_is_refused_where_the_prompt_has_no_end(model: Any) -> None:
    row = Row([BOS, video(1), *range(3, 90), 5, 6, 7])
    options = {"max_new_tokens": 4, "eos_token_id": 999, "prompt_lookup_num_tokens": 3}
    with (
        tokenprune.attach(model, spec(4)),
        pytest.raises(UnsupportedError, match="candidates of assisted decoding"),
    ):
        model.generate(**collate([row]), max_matching_ngram_size=1, do_sample=False, **options)


def test_candidates_are_refused_in_forward_too(model: Any) -> None:
    inputs = collate(prompts()[1:2])
    with tokenprune.attach(model, spec(4)):
        cache = model(**collate([Row([BOS, 5, 6])]), use_cache=True).past_key_values
        mask = torch.cat([torch.ones(1, 3).long(), inputs.pop("attention_mask")], 1)
        with pytest.raises(UnsupportedError, match="3 candidates"):
            model(**inputs, attention_mask=mask, past_key_values=cache, logits_to_keep=4)


@pytest.mark.parametrize("by", ["last", "cls"])
@pytest.mark.parametrize("row", [0, 1])
def test_chunked_prefill_is_refused(model: Any, by: str, row: int) -> None:
    prompt = prompts()[row]
    for chunk in (5, 20):
        with pytest.raises(UnsupportedError, match="(drop|unset) prefill_chunk_size"):
            reduced(model, spec(4, 2, by), batch=[prompt], prefill_chunk_size=chunk)


def test_more_images_than_placeholders_is_for_the_model_to_refuse(model: Any) -> None:
    inputs = collate([Row([BOS, 5, 6])]) | {"pixel_values_videos": video(1)[None]}
    with tokenprune.attach(model, spec(4)), pytest.raises(ValueError, match="do not match"):
        model(**inputs)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([spec(4, per="frame"), before(9)], r"all stages must share per, got \['frame', 'image'\]"),
        ([spec(4, 2), spec(5, 2)], r"two stages at after-layer\(2\)"),
    ],
)
def test_refusals(model: Any, stages: list[str], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        tokenprune.attach(model, *stages)


@pytest.mark.skipif(VERSION < (5, 23), reason="taken for videos that transformers has lost")
def test_placeholders_that_stand_for_nothing_are_text(model: Any) -> None:
    """As they are to the model itself: its embedding of the placeholder stays."""
    batch = [Row([BOS, picture(1), 5, VIDEO, 6]), Row([BOS, 7, VIDEO, picture(2), 8])]
    wanted = greedy(model, batch, [Cut(1, evict(4, "text"))], "image")
    check(reduced(model, spec(4, 1, "text"), batch=batch), wanted)


def test_inputs_embeds_are_refused(model: Any) -> None:
    embeds = torch.zeros(1, 4, 32)
    with tokenprune.attach(model, spec(4)), pytest.raises(UnsupportedError, match="pass input_ids"):
        model(inputs_embeds=embeds)


@pytest.mark.parametrize("recipe", ALL_RECIPES)
def test_every_recipe_treats_a_batch_as_its_rows(model: Any, recipe: str) -> None:
    """Signals of both towers, in rows of pictures and videos."""
    together = reduced(model, recipe, steps=2)
    assert together.logits.isfinite().all()
    vanilla = generate(model, collate(prompts()), 2)
    assert not torch.equal(together.logits[[0, 1, 3]], vanilla.logits[[0, 1, 3]])
    for row, prompt in enumerate(prompts()):
        alone = reduced(model, recipe, batch=[prompt], steps=2)
        close(alone.logits[0], together.logits[row])
