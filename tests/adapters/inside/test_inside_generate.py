"""`generate` with stages after layers says what vanilla layers say about the same kept tokens.

Always three ragged, left padded rows (one image, two images, text only): with one row and no
padding most bugs are invisible.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

import tokenprune
from support.flash import flash_attention
from support.inside_oracle import Cut, Recompute, evict, follow, greedy
from support.llava import BOS, PATCHES, Answer, Row, collate, generate, picture, prompts, tiny_llava
from tokenprune import UnsupportedError

TOLERANCE = 1e-5  # of float32 logits around 10
POSITIONS = ["original", "reindexed"]
SPECS = {"last": "fastv", "text": "fastv(queries='text')", "cls": "cls-attention"}


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE)


def check(answer: Answer, wanted: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(answer.text, wanted[0])
    close(answer.logits, wanted[1])


def spec(keep: int, layer: int = 2, by: str = "last", positions: str = "original") -> str:
    return f"{SPECS[by]} | evict({keep}) @ after-layer({layer}, positions={positions!r})"


def before(keep: int, positions: str = "reindexed") -> str:
    return f"cls-attention | evict({keep}) @ before-llm(positions={positions!r})"


def reduced(model: Any, *stages: str, batch: list[Row] | None = None, **options: Any) -> Answer:
    """`generate` of the attached model."""
    with tokenprune.attach(model, *stages):
        return generate(model, collate(batch or prompts()), **{"steps": 5, **options})


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("first", [None, 10])
@pytest.mark.parametrize(("layer", "keep", "by"), [(1, 4, "last"), (2, 9, "cls"), (2, 1, "text")])
def test_greedy_equals_the_oracle(
    llava: Any, attention: str, positions: str, first: int | None, layer: int, keep: int, by: str
) -> None:
    flash = attention == "flash"
    model = llava("sdpa" if flash else attention)
    cuts = [Cut(layer, evict(keep, by), positions)]
    wanted = greedy(model, prompts(), cuts, before=first)
    stages = [spec(keep, layer, by, positions), *([before(first)] if first else [])]
    with flash_attention(model) if flash else nullcontext():
        answer = reduced(model, *stages)
    check(answer, wanted)
    assert torch.equal(answer.prompt, collate(prompts())["input_ids"])


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("first", [None, 10])
def test_masking_and_dropping_are_the_same(llava: Any, positions: str, first: int | None) -> None:
    """The two oracles agree: -inf in later layers is as good as not being there."""
    model = llava()
    cuts = [Cut(1, evict(6), positions), Cut(2, evict(2, "text"), positions)]
    text, logits = greedy(model, prompts(), cuts, before=first, style="mask")
    dropped = greedy(model, prompts(), cuts, before=first, style="drop")
    assert torch.equal(text, dropped[0])
    close(logits, dropped[1])


def test_the_oracle_has_teeth(llava: Any) -> None:
    """Budget, layer, scorer, positions and the first stage all matter to the logits."""
    model = llava()

    def first_logits(keep: int, layer: int, by: str, positions: str, **options: Any) -> Tensor:
        cuts = [Cut(layer, evict(keep, by), positions)]
        return greedy(model, prompts(), cuts, steps=1, **options)[1][:2, 0]

    usual = first_logits(4, 2, "last", "original")
    for others in (
        first_logits(5, 2, "last", "original"),
        first_logits(4, 1, "last", "original"),
        first_logits(4, 2, "text", "original"),
        first_logits(4, 2, "cls", "original"),
        first_logits(4, 2, "last", "reindexed"),
        first_logits(4, 2, "last", "original", before=10),
        greedy(model, prompts(), [], steps=1)[1][:2, 0],
    ):
        assert (others - usual).abs().amax(1).min() > 0.05


def test_the_oracle_without_stages_is_vanilla(llava: Any) -> None:
    model = llava()
    check(generate(model, collate(prompts()), steps=5), greedy(model, prompts(), []))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("scorers", [("last", "last"), ("cls", "cls"), ("text", "cls")])
@pytest.mark.parametrize("first", [None, 12])
def test_several_stages(
    llava: Any, attention: str, positions: str, scorers: tuple[str, str], first: int | None
) -> None:
    """Later stages see the tokens, and the vision tower's signals, that earlier ones left."""
    model = llava(attention)
    one, two = scorers
    cuts = [Cut(1, evict(8, one), positions), Cut(2, evict(3, two), positions)]
    wanted = greedy(model, prompts(), cuts, before=first)
    stages = [spec(3, 2, two, positions), spec(8, 1, one, positions)]
    answer = reduced(model, *([before(first)] if first else []), *stages)
    check(answer, wanted)
    lengths = [layer.keys.shape[2] for layer in answer.cache.layers]
    real = max(len(row.ids) for row in prompts()) - 2 * PATCHES
    assert [length - 4 for length in lengths[1:]] == [real + 2 * 8, real + 2 * 3]


@pytest.mark.parametrize("ways", [("original", "reindexed"), ("reindexed", "original")])
def test_stages_with_different_positions(llava: Any, ways: tuple[str, str]) -> None:
    model = llava()
    cuts = [Cut(1, evict(8), ways[0]), Cut(2, evict(3, "cls"), ways[1])]
    wanted = greedy(model, prompts(), cuts, before=12, positions="original")
    stages = [spec(8, 1, "last", ways[0]), spec(3, 2, "cls", ways[1])]
    check(reduced(model, before(12, "original"), *stages), wanted)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("first", [None, 10])
def test_withdrawing_all_visual_tokens(llava: Any, positions: str, first: int | None) -> None:
    model = llava()
    wanted = greedy(model, prompts(), [Cut(2, evict(0), positions)], before=first)
    stages = [before(first)] if first else []
    answer = reduced(model, *stages, spec(0, 2, "last", positions))
    check(answer, wanted)
    text = max(len(row.ids) - PATCHES * len(row.images) for row in prompts())
    assert answer.cache.layers[2].keys.shape[2] == text + 4


def test_a_stage_behind_a_withdrawal_has_nothing_to_do(llava: Any) -> None:
    model = llava()
    wanted = greedy(model, prompts(), [Cut(1, evict(0))])
    check(reduced(model, spec(0, 1), spec(5, 2)), wanted)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(
    "stages",
    [[(PATCHES, 2)], [(PATCHES + 84, 1)], [(4, 3)], [(0, 3)], [(1, 99)], [(PATCHES, 1), (50, 2)]],
)
def test_keeping_everything_or_starting_too_late_is_vanilla_bit_for_bit(
    llava: Any, attention: str, positions: str, stages: list[tuple[int, int]]
) -> None:
    model = llava(attention)
    vanilla = generate(model, collate(prompts()))
    for by in ("last", "cls"):
        each = [spec(keep, layer, by, positions) for keep, layer in stages]
        late = any(layer >= 3 for _, layer in stages)
        with pytest.warns(match="reduces nothing: the LLM has 3") if late else nullcontext():
            answer = reduced(model, *each, steps=6)
        assert torch.equal(answer.text, vanilla.text)
        assert torch.equal(answer.logits, vanilla.logits)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("by", SPECS)
def test_more_padding_changes_nothing(llava: Any, positions: str, by: str) -> None:
    model = llava()
    wanted = greedy(model, prompts(), [Cut(2, evict(4, by), positions)])
    with tokenprune.attach(model, spec(4, 2, by, positions)):
        for extra in (1, 7):
            answer = generate(model, collate(prompts(), extra=extra), steps=5)
            check(answer, wanted)
            assert torch.equal(answer.text, wanted[0])


def test_much_text_beside_little(llava: Any) -> None:
    """More questions than slots to fill up with: padding is asked about, and must say nothing."""
    model = llava()
    batch = [Row([BOS, picture(1), 5]), Row([BOS, picture(2), *range(10, 50)])]
    for by in ("text", "last"):
        cuts = [Cut(1, evict(2, by)), Cut(2, evict(1, by))]
        wanted = greedy(model, batch, cuts, before=4)
        check(reduced(model, before(4), spec(2, 1, by), spec(1, 2, by), batch=batch), wanted)


def test_an_image_at_the_end_of_a_prompt(llava: Any) -> None:
    """No text asks about it: its own last token does."""
    model = llava()
    batch = [Row([BOS, 5, 6, picture(1)]), Row([BOS, picture(2), 7, 8, picture(3)])]
    for by in ("last", "text"):
        wanted = greedy(model, batch, [Cut(2, evict(4, by))])
        check(reduced(model, spec(4, 2, by), batch=batch), wanted)


def test_sampling_follows_the_oracle(llava: Any) -> None:
    model = llava()
    batch = [row for row in prompts() for _ in range(2)]

    def choose(logits: Tensor) -> Tensor:
        return torch.multinomial((logits / 1.5).softmax(-1), 1)[:, 0]

    options = {"do_sample": True, "num_return_sequences": 2, "temperature": 1.5, "top_k": 0}
    torch.manual_seed(7)
    answer = reduced(model, spec(4), batch=prompts(), **options)
    torch.manual_seed(7)
    text, logits = follow(model, batch, [Cut(2, evict(4))], 5, choose)
    assert torch.equal(answer.text, text)
    close(answer.logits, logits)
    assert len({tuple(row) for row in text.tolist()}) > len(prompts())  # it did sample


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("first", [None, 10])
def test_beams(llava: Any, attention: str, positions: str, first: int | None) -> None:
    """Batch = single, and the scores are the log probabilities that the oracle gives."""
    model = llava(attention)
    stages = [spec(4, 1, "last", positions), spec(2, 2, "cls", positions)]
    stages += [before(first, positions)] if first else []
    cuts = [Cut(1, evict(4), positions), Cut(2, evict(2, "cls"), positions)]
    options: dict[str, Any] = {
        "num_beams": 3,
        "num_return_sequences": 2,
        "do_sample": False,
        "max_new_tokens": 5,
        "eos_token_id": None,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    with tokenprune.attach(model, *stages):
        out = model.generate(**collate(prompts()), **options)
        single = [model.generate(**collate([row]), **options) for row in prompts()]
    text = out.sequences[:, -5:]
    assert torch.equal(text, torch.cat([each.sequences[:, -5:] for each in single]))
    close(out.sequences_scores, torch.cat([each.sequences_scores for each in single]))
    for number, row in enumerate(prompts()):
        recompute = Recompute(model, row, cuts, before=first, positions=positions)
        recompute.logits([])
        for beam in (2 * number, 2 * number + 1):
            said = text[beam].tolist()
            each = [
                recompute.logits(said[:n]).log_softmax(-1)[token] for n, token in enumerate(said)
            ]
            close(out.sequences_scores[beam], torch.stack(each).mean())


def test_a_batch_equals_its_rows_alone_whatever_the_scorer(llava: Any) -> None:
    """Also for scores that are drawn per image: an image is known by its pixels."""
    model = llava()
    for scorer in ("random", "uniform", "fastv", "fastv(queries='text')", "cls-attention"):
        with tokenprune.attach(model, f"{scorer} | evict(4) @ after-layer(1)"):
            together = generate(model, collate(prompts()), steps=3)
            for number, row in enumerate(prompts()):
                alone = generate(model, collate([row]), steps=3)
                assert torch.equal(alone.text[0], together.text[number])
                close(alone.logits[0], together.logits[number])


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("by", ["last", "cls"])
def test_without_a_cache_every_step_selects_anew(llava: Any, positions: str, by: str) -> None:
    """Defined so: each step is a prompt of its own, ranked by its own last token."""
    model = llava()
    cuts = [Cut(1, evict(4, by), positions)]
    rows = prompts()
    answer = reduced(model, spec(4, 1, by, positions), use_cache=False)
    for number, row in enumerate(rows):
        for step in range(5):
            said = answer.text[number, :step].tolist()
            close(
                answer.logits[number, step],
                Recompute(model, Row([*row.parts, *said]), cuts).logits([]),
            )
    if by == "cls":  # the same set is selected at every step
        check(answer, greedy(model, rows, cuts))


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash"])
def test_gaps_without_padding_and_cache(llava: Any, attention: str) -> None:
    """Gapped positions without mask and cache look like several packed sequences: they are not."""
    model, row = llava("sdpa" if attention == "flash" else attention), prompts()[1]
    wanted = Recompute(model, row, [Cut(1, evict(4))]).logits([])
    inputs = collate([row])
    with (
        flash_attention(model) if attention == "flash" else nullcontext(),
        tokenprune.attach(model, spec(4, 1)),
        torch.no_grad(),
    ):
        for masked in (True, False):
            if not masked:
                del inputs["attention_mask"]
            close(model(**inputs, use_cache=False).logits[0, -1], wanted)
            close(model(**inputs).logits[0, -1], wanted)


def test_bfloat16_is_finite_and_keep_all_is_vanilla() -> None:
    model = tiny_llava().to(torch.bfloat16)
    inputs = collate(prompts()) | {"pixel_values": collate(prompts())["pixel_values"].bfloat16()}
    vanilla = generate(model, inputs)
    with tokenprune.attach(model, spec(PATCHES), spec(PATCHES, 1, "cls")):
        assert torch.equal(generate(model, inputs).logits, vanilla.logits)
    with tokenprune.attach(model, spec(4), spec(8, 1, "cls"), before(12)):
        few = generate(model, inputs)
    assert few.logits.isfinite().all()
    assert few.cache.layers[2].keys.dtype == torch.bfloat16
    assert not torch.equal(few.logits[:2], vanilla.logits[:2])


def test_text_only_batches_are_stock(llava: Any) -> None:
    model = llava()
    texts = collate([Row([BOS, 31, 32]), Row([BOS, 41, 42, 43, 44])])
    vanilla = generate(model, texts)
    with tokenprune.attach(model, spec(4), before(8)) as attachment:
        answer = generate(model, texts)
    assert torch.equal(answer.logits, vanilla.logits)
    assert attachment.report.calls == 0
    assert all(type(layer).__name__ == "DynamicLayer" for layer in answer.cache.layers)


def test_a_text_only_row_equals_the_row_without_tokenprune(llava: Any) -> None:
    model = llava()
    vanilla = generate(model, collate([prompts()[2]]), steps=5)
    close(reduced(model, spec(4)).logits[2:], vanilla.logits)


class _Collect(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.seen += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streaming(llava: Any) -> None:
    model, row = llava(), prompts()[1]
    text, _ = greedy(model, [row], [Cut(2, evict(4))])
    streamer = _Collect()
    reduced(model, spec(4), batch=[row], streamer=streamer)
    assert streamer.seen == row.ids + text[0].tolist()
    assert streamer.ended


LOOKUP = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}


@pytest.mark.parametrize("positions", POSITIONS)
def test_prompt_lookup(llava: Any, positions: str) -> None:
    """Candidates are verified several at a time, and refused ones are cropped off the cache."""
    model = llava()
    # Every word stands in the prompt, so there always is something to look up.
    row = Row([BOS, picture(1), *range(3, 99), picture(2), 5, 6, 7])
    text, _ = greedy(model, [row], [Cut(2, evict(4, "cls"), positions)], steps=10)
    queries: list[int] = []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda layer, args: queries.append(args[0].shape[1])
    )
    # transformers < 5.13 needs an end token to look for: here one that never comes.
    options = {"max_new_tokens": 10, "eos_token_id": 999, "do_sample": False}
    options |= {"return_dict_in_generate": True} | LOOKUP
    try:
        with tokenprune.attach(model, spec(4, 2, "cls", positions)):
            out = model.generate(**collate([row]), **options)
    finally:
        handle.remove()
    assert out.sequences[:, len(row.ids) :].tolist() == text.tolist()
    assert max(queries[1:]) > 1  # candidates there were
    layers = out.past_key_values.layers
    assert layers[0].keys.shape[2] - layers[2].keys.shape[2] == 2 * (PATCHES - 4)


@pytest.mark.parametrize("by", ["last", "text"])
def test_prompt_lookup_is_refused_where_the_prompt_has_no_end(llava: Any, by: str) -> None:
    """The first pass holds candidates behind the prompt: its last token would be one of them."""
    model = llava()
    row = Row([BOS, picture(1), *range(3, 99), 5, 6, 7])
    with (
        tokenprune.attach(model, spec(4, 2, by)),
        pytest.raises(UnsupportedError, match="3 candidates of assisted decoding"),
    ):
        model.generate(**collate([row]), max_new_tokens=4, eos_token_id=999, **LOOKUP)


@pytest.mark.parametrize("by", ["last", "cls"])
def test_chunked_prefill_is_refused(llava: Any, by: str) -> None:
    """Also where chunks hold whole images: the end of a chunk is not the end of the prompt."""
    model, row = llava(), prompts()[0]
    for chunk in (5, row.ids.index(13), 100):
        with pytest.raises(UnsupportedError, match="(drop|unset) prefill_chunk_size"):
            reduced(model, spec(4, 2, by), batch=[row], prefill_chunk_size=chunk)


def test_switching_the_attention_implementation_while_attached(llava: Any) -> None:
    model = llava()
    wanted = greedy(model, prompts(), [Cut(2, evict(4))])
    with tokenprune.attach(model, spec(4)):
        try:
            for attention in ("eager", "sdpa"):
                model.set_attn_implementation(attention)
                check(generate(model, collate(prompts()), steps=5), wanted)
        finally:
            model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_modes(llava: Any, context: Any) -> None:
    model = llava()
    wanted = greedy(model, prompts(), [Cut(2, evict(4))])
    with context():
        check(reduced(model, spec(4)), wanted)
