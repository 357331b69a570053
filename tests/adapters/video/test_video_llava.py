"""Video-LLaVA before the LLM: pictures, frames and videos, against hand-built embeddings.

Batches are ragged and left padded: a picture; two videos next to each other; text only; a video
between two pictures.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    MistralConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

import tokenprune
from support.flash import flash_attention
from support.llava import BOS, PAD, Answer, generate, picture
from support.outputs import shown_features
from support.video_llava import (
    FRAMES,
    PATCHES,
    Row,
    collate,
    embeddings,
    frame_states,
    greedy,
    greedy_batch,
    kept,
    prompts,
    tiny_video_llava,
    video,
)
from tokenprune import (
    AttachError,
    BeforeLLM,
    ImageReport,
    MissingSignalError,
    Plan,
    Reducer,
    Signals,
    Strategy,
    UnsupportedError,
    VisualTokens,
)
from tokenprune_adapters.hf import chunked_prefill
from tokenprune_adapters.hf.chunked_prefill import VERSION
from tokenprune_adapters.hf.families import VIDEO_LLAVA

STEPS = 5
_shared = lru_cache(tiny_video_llava)
PER = pytest.mark.parametrize("per", ["image", "frame"])
BOTH_POSITIONS = pytest.mark.parametrize("positions", ["reindexed", "original"])


def leftovers(model: nn.Module) -> list[str]:
    found = [
        f"{name}: {hook}"
        for name, module in model.named_modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for hook in hooks.values()
        if "tokenprune" in (getattr(hook, "__module__", None) or "")
    ]
    return found + [name for name in vars(model.model) if name.startswith("get_")]


@pytest.fixture
def make() -> Iterator[Callable[..., Any]]:
    """Tiny models, shared by tests with equal arguments: each must leave them clean."""
    used: list[nn.Module] = []

    def made(attention: str = "sdpa", **options: object) -> Any:
        used.append(_shared(attention, **options))
        return used[-1]

    yield made
    for model in used:
        assert leftovers(model) == []


@pytest.fixture
def model(make: Callable[..., Any]) -> Any:
    return make()


def spec(keep: int | float, per: str = "image", positions: str = "reindexed") -> str:
    budget = f"evict({keep}, per={per!r})"
    return f"cls-attention(layers=1) | {budget} @ before-llm(positions={positions!r})"


def pruned(
    model: nn.Module,
    inputs: dict[str, Any],
    keep: int | float,
    per: str = "image",
    positions: str = "reindexed",
    **options: Any,
) -> Answer:
    with tokenprune.attach(model, spec(keep, per, positions)):
        return generate(model, inputs, **{"steps": STEPS, **options})


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def check(answer: Answer, wanted: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(answer.text, wanted[0])
    close(answer.logits, wanted[1])


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash"])
@PER
@BOTH_POSITIONS
@pytest.mark.parametrize("keep", [1, 5, 12])
def test_greedy_equals_hand_built_embeddings(
    make: Callable[..., Any], attention: str, per: str, positions: str, keep: int
) -> None:
    flash = attention == "flash"
    model = make("sdpa" if flash else attention)
    wanted = greedy_batch(model, prompts(), keep, STEPS, per, positions)
    with flash_attention(model) if flash else nullcontext():
        answer = pruned(model, collate(prompts()), keep, per, positions)
    check(answer, wanted)
    assert torch.equal(answer.prompt, collate(prompts())["input_ids"])


def test_the_oracle_is_vanilla_where_everything_is_kept(model: Any) -> None:
    vanilla = generate(model, collate(prompts()), STEPS)
    check(vanilla, greedy_batch(model, prompts(), 10**6, STEPS))


def test_the_tiny_model_has_teeth(model: Any) -> None:
    """Budget, scores, positions and what a row is all matter, in every prompt with a video."""
    usual = greedy_batch(model, prompts(), 5, 1)[1][:, 0]
    assert 5 < usual.abs().max() < 20
    for others in (
        greedy_batch(model, prompts(), 6, 1),
        greedy_batch(model, prompts(), 5, 1, per="frame"),
        greedy_batch(model, prompts(), 5, 1, positions="original"),
        greedy_batch(model, prompts(), 5, 1, layers=3),
    ):
        distance = (others[1][:, 0] - usual).abs().amax(1)
        assert distance[[1, 3]].min() > 0.05
        assert distance[2] == 0  # text alone


def test_crops_are_frames_to_this_model(model: Any) -> None:
    """So `fastervlm`, whose budget is per crop, is what its branch for videos does."""
    wanted = greedy_batch(model, prompts(), 4, STEPS, per="frame")
    with tokenprune.attach(model, "fastervlm(keep=0.25)"):
        check(generate(model, collate(prompts()), STEPS), wanted)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@PER
@pytest.mark.parametrize("keep", [10**6, 1.0, PATCHES * FRAMES])
def test_keeping_everything_is_vanilla_bit_for_bit(
    make: Callable[..., Any], attention: str, per: str, keep: float
) -> None:
    model = make(attention)
    vanilla = generate(model, collate(prompts()), STEPS)
    answer = pruned(model, collate(prompts()), keep, per)
    assert torch.equal(answer.text, vanilla.text)
    assert torch.equal(answer.logits, vanilla.logits)


def test_a_budget_of_a_picture_leaves_pictures_whole_and_videos_not(model: Any) -> None:
    answer = pruned(model, collate(prompts()), PATCHES)
    check(answer, greedy_batch(model, prompts(), PATCHES, STEPS))
    assert not torch.equal(answer.logits[1], generate(model, collate(prompts()), STEPS).logits[1])


@PER
@pytest.mark.parametrize("options", [{"num_beams": 3}, {}], ids=["beams", "greedy"])
def test_a_batch_equals_its_rows_alone(model: Any, per: str, options: dict[str, Any]) -> None:
    together = pruned(model, collate(prompts()), 4, per, **options)
    for row, prompt in enumerate(prompts()):
        alone = pruned(model, collate([prompt]), 4, per, **options)
        assert torch.equal(alone.text[0], together.text[row])
        if not options:
            close(alone.logits[0], together.logits[row])


def over_embeddings(model: Any, batch: list[Row], keep: int, per: str) -> dict[str, Tensor]:
    """A left padded batch of compressed prompts, for a vanilla `generate`."""
    each = [
        embeddings(model, row, [kept(model, part, keep, per) for part in row.visual])[0]
        for row in batch
    ]
    width = max(embeds.shape[1] for embeds in each)
    pad = model.get_input_embeddings()(torch.tensor([[PAD]]))
    mask = [[0] * (width - e.shape[1]) + [1] * e.shape[1] for e in each]
    rows = [torch.cat([pad.expand(-1, width - e.shape[1], -1), e], 1) for e in each]
    return {"inputs_embeds": torch.cat(rows).detach(), "attention_mask": torch.tensor(mask)}


@PER
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 1.5},
    ],
    ids=["beams", "sampling"],
)
def test_expanded_batches_equal_the_same_over_embeddings(
    model: Any, per: str, options: dict[str, Any]
) -> None:
    options = {"do_sample": False, "max_new_tokens": STEPS, "eos_token_id": None} | options
    torch.manual_seed(7)
    wanted = model.generate(**over_embeddings(model, prompts(), 4, per), **options)
    with tokenprune.attach(model, spec(4, per)):
        torch.manual_seed(7)
        out = model.generate(**collate(prompts()), **options)
    assert torch.equal(out[:, -wanted.shape[1] :], wanted)


@torch.no_grad()
def test_forward_by_itself_encodes_pictures_and_videos(model: Any) -> None:
    inputs = collate(prompts())
    _, wanted = greedy_batch(model, prompts(), 5, 1)
    with tokenprune.attach(model, spec(5)):
        output = model(**inputs)
    close(output.logits[:, -1], wanted[:, 0])
    assert output.logits.shape[1] == inputs["input_ids"].shape[1]


def test_both_names_of_pictures(model: Any) -> None:
    if "pixel_values" not in inspect.signature(model.forward).parameters:
        pytest.skip("this version of transformers has the one name")
    inputs = collate(prompts())
    wanted = pruned(model, inputs, 4)
    inputs["pixel_values"] = inputs.pop("pixel_values_images")
    assert torch.equal(pruned(model, inputs, 4).logits, wanted.logits)


@PER
@pytest.mark.parametrize("chunk", [3, 11, 40])
@pytest.mark.skipif(VERSION < (5, 23), reason="loses videos by itself; refused, see below")
def test_chunked_prefill(model: Any, per: str, chunk: int) -> None:
    wanted = greedy_batch(model, prompts(), 1, STEPS, per)
    check(pruned(model, collate(prompts()), 1, per, prefill_chunk_size=chunk), wanted)


@pytest.mark.parametrize(("row", "lost"), [(0, "images"), (1, "videos")])
@pytest.mark.skipif(VERSION >= (5, 23), reason="works")
def test_chunked_prefill_that_loses_videos_is_refused(model: Any, row: int, lost: str) -> None:
    with pytest.raises(UnsupportedError, match=f"without their {lost}.*unset prefill_chunk_size"):
        pruned(model, collate(prompts()[row : row + 1]), 1, prefill_chunk_size=11)


TURN = [[51, video(7), 52], [53, picture(8), 54], [55, 56, 57, video(9)], [58, 59]]


@PER
@BOTH_POSITIONS
def test_a_second_turn(model: Any, per: str, positions: str) -> None:
    """More videos and pictures come along; what is new is reduced, what is cached stays."""
    inputs = collate(prompts())
    new = collate([Row(list(each)) for each in TURN])
    with tokenprune.attach(model, spec(4, per, positions)):
        first = generate(model, inputs, STEPS)
        ones = torch.ones_like(first.text)
        ids = [inputs["input_ids"], first.text, new["input_ids"]]
        mask = [inputs["attention_mask"], ones, new["attention_mask"]]
        new |= {"input_ids": torch.cat(ids, 1), "attention_mask": torch.cat(mask, 1)}
        second = generate(model, new, STEPS, past_key_values=first.cache)
    rows = zip(prompts(), first.text.tolist(), TURN, strict=True)
    batch = [Row([*row.parts, *text, *more]) for row, text, more in rows]
    check(second, greedy_batch(model, batch, 4, STEPS, per, positions))


def test_several_feature_layers() -> None:
    model = tiny_video_llava(feature_layer=[-4, -2])
    check(
        pruned(model, collate(prompts()), 5),
        greedy_batch(model, prompts(), 5, STEPS),
    )


def test_a_tower_without_cls_shows_frames_of_patches_alone() -> None:
    model = tiny_video_llava(tower="siglip", select="full")
    batch = [Row(row.parts, cls=0) for row in prompts()]
    with tokenprune.attach(model, "random | evict(5, per='frame')") as attachment:
        answer = generate(model, collate(batch), STEPS)
        pictures, videos = (ImageReport(PATCHES, 5),) * 3, (ImageReport(48, 15),) * 3
        assert attachment.report.images == pictures + videos
    for row, prompt in enumerate(batch[:2]):
        with tokenprune.attach(model, "random | evict(5, per='frame')") as attachment:
            alone = generate(model, collate([prompt]), STEPS)
        chosen = attachment.last.plan.anchors.tolist()
        frames = 1 if row == 0 else FRAMES
        groups = [chosen[n : n + frames] for n in range(0, len(chosen), frames)]
        which = [[f * PATCHES + n for f, c in enumerate(g) for n in c] for g in groups]
        text, logits = greedy(model, prompt, which, STEPS)
        assert answer.text[row].tolist() == alone.text[0].tolist() == text
        close(answer.logits[row], logits)


def test_merging_mixes_patches_of_a_video_and_never_cls(model: Any) -> None:
    """A merged token is the mean of its members, before the projector, where the first one was."""
    prompt = Row([BOS, 11, video(4), 12, 13])
    with tokenprune.attach(model, "tome(7)") as attachment:
        answer = generate(model, collate([prompt]), 1)
    plan = attachment.last.plan
    assert plan.members is not None
    cls, patches = frame_states(model, prompt.visual[0])
    mixed = plan.dense()[0] @ patches.flatten(0, 1)
    core = model.model
    rows, anchors = [], plan.anchors[0].tolist()
    for frame in range(FRAMES):
        rows.append(cls[frame, 0])
        rows += [mixed[n] for n, anchor in enumerate(anchors) if anchor // PATCHES == frame]
    embed = core.get_input_embeddings()
    with torch.no_grad():
        visual = core.multi_modal_projector(torch.stack(rows))
        before, after = embed(torch.tensor(prompt.ids[:2])), embed(torch.tensor([12, 13]))
        embeds = torch.cat([before, visual, after])[None]
        logits = model(inputs_embeds=embeds).logits[0, -1]
    close(answer.logits[0, 0], logits)


@pytest.mark.parametrize(
    ("per", "images"),
    [
        ("image", [(16, 5)] * 3 + [(48, 5)] * 3),
        ("frame", [(16, 5)] * 3 + [(48, 15)] * 3),
    ],
)
def test_the_report_counts_pictures_and_then_videos_of_one_call(
    model: Any, per: str, images: list[tuple[int, int]]
) -> None:
    with tokenprune.attach(model, spec(5, per)) as attachment:
        generate(model, collate(prompts()), 2)
        first = attachment.report
        assert [(image.before, image.after) for image in first.images] == images
        assert first.calls == 1
        left = sum(after for _, after in images)
        assert first.layers == ((0, left),)
        assert (first.tokens_before, first.tokens_after) == (192, left)
        longest = max(len(row.ids) for row in prompts())
        short = max(
            len(row.ids)
            - sum(
                (PATCHES - 5)
                if part.ndim == 3
                else (FRAMES * PATCHES - (5 if per == "image" else 5 * FRAMES))
                for part in row.visual
            )
            for row in prompts()
        )
        slot = 3 * 2 * len(prompts()) * 2 * 8 * 4  # layers, K and V, rows, heads, channels, bytes
        assert (first.kv_bytes, first.kv_bytes_vanilla) == (short * slot, longest * slot)
        with torch.no_grad():
            model(**collate(prompts()))
        assert attachment.report.calls == 2
        assert attachment.report.images == first.images
        with torch.no_grad():
            model(**collate(prompts()[:1]))
            model(**collate(prompts()[1:2]))
        assert attachment.report.calls == 4
        assert len(attachment.report.images) == 2


def _fail(*args: object) -> None:
    raise ZeroDivisionError


@torch.no_grad()
def test_what_was_counted_before_a_failure_joins_nothing(model: Any) -> None:
    """Pictures whose videos never came, in `generate` or in `forward`, are a call of their own."""
    both, videos = collate(prompts()), collate(prompts()[1:2])
    runs = [lambda inputs: generate(model, inputs, 1), lambda inputs: model(**inputs)]
    for before in runs:
        for after in runs:
            with tokenprune.attach(model, spec(5)) as attachment:
                model(**both)
                after(videos)
                assert (attachment.report.calls, len(attachment.report.images)) == (2, 2)
                handle = model.model.video_tower.register_forward_pre_hook(_fail)
                with pytest.raises(ZeroDivisionError):
                    before(both)
                handle.remove()
                if (before, after) != (runs[0], runs[0]):  # where no forward is in between
                    after(videos)
                    assert (attachment.report.calls, len(attachment.report.images)) == (4, 2)


@dataclass(frozen=True)
class _Blur(Reducer):
    """Mixes each token with the one after it, and keeps their number."""

    needs_scores: ClassVar[bool] = False

    def plan(self, tokens: VisualTokens, scores: Tensor | None, signals: Signals) -> Plan:
        count = tokens.mask.shape[1]
        weights = (torch.eye(count) + torch.eye(count).roll(1, 1).triu()) / 2
        weights[-1, -1] = 1
        rows = weights.expand(len(tokens.mask), -1, -1)
        return Plan.of_weights(tokens.patches, tokens.mask, rows)


@pytest.mark.parametrize("frames", [1, FRAMES])
def test_mixing_without_reducing_is_not_taken_for_doing_nothing(model: Any, frames: int) -> None:
    prompt = Row([BOS, 11, video(4, frames), 12, 13])
    with tokenprune.attach(model, Strategy(_Blur()).at(BeforeLLM())):
        answer = generate(model, collate([prompt]), 1)
    cls, patches = frame_states(model, prompt.visual[0])
    flat = patches.flatten(0, 1)
    mixed = torch.cat([(flat[:-1] + flat[1:]) / 2, flat[-1:]]).reshape(patches.shape)
    embed = model.get_input_embeddings()
    with torch.no_grad():
        visual = model.model.multi_modal_projector(torch.cat([cls, mixed], 1)).flatten(0, 1)
        before, after = embed(torch.tensor(prompt.ids[:2])), embed(torch.tensor([12, 13]))
        logits = model(inputs_embeds=torch.cat([before, visual, after])[None]).logits[0, -1]
    close(answer.logits[0, 0], logits)


def test_provenance_of_what_is_kept(model: Any) -> None:
    """Positions are frame times patches plus patch."""
    prompt = prompts()[1]
    with tokenprune.attach(model, spec(9)) as attachment:
        generate(model, collate([prompt]), 1)
    tokens = attachment.last.tokens
    for row, part in enumerate(prompt.visual):
        assert tokens.patches[row].tolist() == kept(model, part, 9)


@pytest.mark.parametrize("per", ["image", "frame"])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {}], ids=["beams", "greedy"])
def test_the_report_tells_picture_video_frame_and_patch(
    model: Any, per: str, options: dict[str, Any]
) -> None:
    """One entry for each, pictures first, as in `images`; a row for each budget in `last`."""
    with tokenprune.attach(model, spec(5, per)) as attachment:
        generate(model, collate(prompts()), 2, **options)
    report, last = attachment.report, attachment.last
    visual = [part for row in prompts() for part in row.visual]
    parts = [p for p in visual if p.ndim == 3] + [p for p in visual if p.ndim == 4]
    assert [(left.kind, left.number) for left in report.kept] == [
        *(("image", number) for number in range(3)),
        *(("video", number) for number in range(3)),
    ]
    for part, image, left in zip(parts, report.images, report.kept, strict=True):
        wanted = kept(model, part, 5, per)
        pairs = zip(left.frame, left.patch, strict=True)
        assert [frame * PATCHES + patch for frame, patch in pairs] == sorted(wanted)
        assert image.after == len(left) == len(wanted)
    rows = [(o.kind, o.number, o.crop) for o in last.origins]
    frames = range(1 if per == "image" else FRAMES)
    assert rows == [
        *(("image", number, 0) for number in range(3)),
        *(("video", number, frame) for number in range(3) for frame in frames),
    ]
    assert last.plan.lengths == (5,) * len(rows)


@torch.no_grad()
def test_features_of_an_output_are_those_that_entered(model: Any) -> None:
    prompt = prompts()[3]
    vanilla = model(**collate([prompt]))
    with tokenprune.attach(model, spec(5)):
        output = model(**collate([prompt]))
    pictures = shown_features(vanilla).reshape(2, PATCHES, -1)
    parts = [part for part in prompt.visual if part.ndim == 3]
    wanted = [f[kept(model, part, 5)] for f, part in zip(pictures, parts, strict=True)]
    close(shown_features(output).flatten(0, -2), torch.cat(wanted))
    frames = shown_features(vanilla, "video").reshape(FRAMES, PATCHES + 1, -1)
    which = kept(model, prompt.visual[1], 5)
    slots = [
        frame * (PATCHES + 1) + slot
        for frame in range(FRAMES)
        for slot in range(PATCHES + 1)
        if slot == 0 or frame * PATCHES + slot - 1 in which
    ]
    close(shown_features(output, "video").flatten(0, -2), frames.flatten(0, 1)[slots])


def test_gradients_reach_the_kept_patches_of_both_towers(model: Any) -> None:
    """As through hand-made embeddings: here of the loss at the last token."""
    prompt = prompts()[3]
    inputs = {k: v.clone() for k, v in collate([prompt]).items()}
    for name in ("pixel_values_images", "pixel_values_videos"):
        inputs[name].requires_grad_(True)
    with tokenprune.attach(model, spec(5)):
        model(**inputs).logits[0, -1].logsumexp(0).backward()
    for name in ("pixel_values_images", "pixel_values_videos"):
        gradient = inputs[name].grad
        assert gradient is not None
        assert gradient.isfinite().all()
        assert gradient.flatten(-3).abs().amax(-1).min() > 0  # every picture and frame counts
    model.zero_grad()


@pytest.mark.parametrize(
    "where",
    ["image_tower", "video_tower", "multi_modal_projector", "language_model.layers.1"],
)
def test_an_error_in_mid_forward_leaves_nothing_behind(model: Any, where: str) -> None:
    wanted = pruned(model, collate(prompts()), 4)
    vanilla = generate(model, collate(prompts()), STEPS)
    module = model.model.get_submodule(where)

    with tokenprune.attach(model, spec(4)) as attachment:
        handle = module.register_forward_hook(_fail)
        with pytest.raises(ZeroDivisionError):
            generate(model, collate(prompts()), STEPS)
        handle.remove()
        again = generate(model, collate(prompts()), STEPS)
        assert torch.equal(again.logits, wanted.logits)
        assert len(attachment.report.images) == 6
        alone = generate(model, collate(prompts()[:1]), STEPS)
        close(alone.logits[0], wanted.logits[0])
    assert torch.equal(generate(model, collate(prompts()), STEPS).logits, vanilla.logits)


def test_detaching_restores_the_method_and_the_outputs(model: Any) -> None:
    names = set(vars(model.model))
    vanilla = generate(model, collate(prompts()), STEPS)
    assert not torch.equal(pruned(model, collate(prompts()), 4).logits, vanilla.logits)
    assert set(vars(model.model)) == names
    assert torch.equal(generate(model, collate(prompts()), STEPS).logits, vanilla.logits)
    with tokenprune.attach(model, spec(4, "frame")):
        encoders = {"get_image_features", "get_video_features"}
        assert set(vars(model.model)) - names == encoders
    assert set(vars(model.model)) == names


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (spec(5, "crop").replace("@", "| tome(3) @"), r"must share per, got \['frame', 'image'\]"),
        ("random | evict(5); uniform | evict(4)", "2 stages before the LLM; join them"),
    ],
)
def test_refusals(model: Any, stages: str, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        tokenprune.attach(model, stages)
    assert leftovers(model) == []


@pytest.mark.parametrize(
    ("tower", "select", "words"),
    [
        ("clip", "full", r"'full' keeps \[CLS\] among the patches.*; only 'default' is supported"),
        ("siglip", "default", "drops the first patch of a Siglip.*; only 'full' is supported"),
    ],
)
def test_a_select_strategy_that_does_not_fit_the_towers(
    tower: str, select: str, words: str
) -> None:
    with pytest.raises(UnsupportedError, match=words):
        tokenprune.attach(tiny_video_llava(tower=tower, select=select), "random | evict(4)")


def test_a_language_model_with_a_sliding_window() -> None:
    like = tiny_video_llava().config
    text = MistralConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
    )
    config = VideoLlavaConfig(vision_config=like.vision_config, text_config=text)
    with pytest.raises(UnsupportedError, match="MistralModel has sliding.*only full attention"):
        tokenprune.attach(VideoLlavaForConditionalGeneration(config), "random | evict(4)")


def test_a_method_that_somebody_replaced_is_refused(model: Any) -> None:
    core = model.model
    core.get_video_features = core.get_video_features
    try:
        with pytest.raises(AttachError, match="somebody else has replaced .*get_video_features"):
            tokenprune.attach(model, spec(4))
    finally:
        del core.__dict__["get_video_features"]


@torch.no_grad()
def _project(model: Any) -> None:
    model.model.multi_modal_projector(torch.zeros(1, PATCHES, 32))


@torch.no_grad()
def _by_hand(model: Any) -> None:
    model(**collate(prompts()))
    frames = model.model.video_tower(video(1), output_hidden_states=True)
    model.model.multi_modal_projector(frames.hidden_states[-2])


def _call(**options: Any) -> Callable[[Any], Any]:
    @torch.no_grad()
    def call(model: Any) -> Any:
        return model(**(collate(prompts()[1:2]) | options))

    return call


@pytest.mark.parametrize(
    ("use", "error", "words"),
    [
        (_project, MissingSignalError, "projector ran without the vision tower.*or detach"),
        (_by_hand, AttachError, "outside of the model's own get_video_features"),
        (_call(vision_feature_layer=-1), UnsupportedError, "configured vision_feature_layer; set"),
    ],
    ids=["projector", "by hand", "layer"],
)
def test_calls_that_cannot_be_served(
    use: Callable[[Any], Any], error: type[Exception], words: str
) -> None:
    model = tiny_video_llava()
    vanilla = generate(model, collate(prompts()), 1)
    with tokenprune.attach(model, spec(4)), pytest.raises(error, match=words):
        use(model)
    assert leftovers(model) == []
    assert torch.equal(generate(model, collate(prompts()), 1).logits, vanilla.logits)


def test_a_static_cache_gives_the_same_tokens() -> None:
    model, inputs = tiny_video_llava(), collate(prompts())
    with tokenprune.attach(model, spec(4)):
        wanted = generate(model, inputs, 4)
        got = generate(model, inputs, 4, cache_implementation="static", disable_compile=True)
    assert torch.equal(got.text, wanted.text)


@pytest.mark.parametrize(("row", "lost"), [(0, "images"), (1, "videos")])
def test_placeholders_without_what_they_stand_for(model: Any, row: int, lost: str) -> None:
    """The guard of versions that lose videos, in every version."""
    guard = chunked_prefill.RefuseLostImages(VIDEO_LLAVA.anatomy(model))
    inputs = collate(prompts()[row : row + 1])
    call = {"input_ids": inputs["input_ids"], "past_key_values": DynamicCache()}
    with pytest.raises(UnsupportedError, match=f"placeholders came without their {lost}"):
        guard.before(model.model, (), call)
    guard.before(model.model, (), call | inputs)
    encoded = {"mm_encoder_outputs": {lost[:-1]: object()}}
    guard.before(model.model, (), call | encoded)
