"""Consistency with the LLM, against plain loops over eager attention's full maps."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BatchFeature

import tokenprune
from analysis.test_consistency import plain_correlation, plain_overlap
from support import llava, llava_next
from tokenprune import AfterLayer, ClsAttentionScorer, RandomScorer, Scorer, Signals, VisualTokens
from tokenprune.analysis.curves import Consistency
from tokenprune.analysis.layers import consistency, output_attention
from tokenprune.analysis.noted_scores import scorer_of
from tokenprune.analysis.plots import plot
from tokenprune.bench.data import DataError, Sample
from tokenprune.errors import BudgetError, ShapeError, SpecError, UnknownNameError, UnsupportedError

LONGEST = 5
ENDS = list(range(2, 40, 2))  # many, so that answers of a batch end at different tokens


@dataclass
class Family:
    """A tiny model with random weights, and how to make an input of picture and words."""

    build: Callable[..., Any]
    row: Callable[[int, list[int]], Any]
    collate: Callable[[list[Any]], dict[str, Tensor]]
    cls: Callable[[Any, int, int], Tensor]

    def model(self, attention: str = "sdpa") -> Any:
        model = self.build(attention)
        model.generation_config.eos_token_id = ENDS
        model.generation_config.suppress_tokens = [llava.IMAGE]  # random weights would say it
        return model

    def processor(self, images: list[Image.Image], text: list[str], **options: Any) -> BatchFeature:
        """The colour of a picture says which one it is; the words of a question are ids."""
        assert options == {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        rows = [
            self.row(picture.getpixel((0, 0))[0], [int(word) for word in words.split()])
            for picture, words in zip(images, text, strict=True)
        ]
        return BatchFeature(self.collate(rows))


def next_picture(seed: int) -> llava_next.Picture:
    sizes = llava_next.SIZES
    return llava_next.Picture.of(sizes[seed % len(sizes)], seed)


@torch.no_grad()
def cls_of(model: Any, seed: int, layers: int) -> Tensor:
    """VTC-CLS scores `(patches,)` from the maps of an eager tower."""
    tower = model.model.vision_tower
    maps = tower(pixel_values=llava.picture(seed)[None], output_attentions=True).attentions
    return torch.stack([each[0, :, 0, 1:].mean(0) for each in maps[-1 - layers : -1]]).mean(0)


@torch.no_grad()
def cls_of_next(model: Any, seed: int, layers: int) -> Tensor:
    """The same for the patches of all crops, as they are packed."""
    seen = next_picture(seed)
    tower = model.model.vision_tower
    maps = tower(pixel_values=seen.crops, output_attentions=True).attentions
    each = torch.stack([one[:, :, 0, 1:].mean(1) for one in maps[-1 - layers : -1]]).mean(0)
    return torch.stack([each[token] for token in seen.packed if token is not None])


LLAVA = Family(
    llava.tiny_llava,
    lambda seed, words: llava.Row([llava.BOS, 11, llava.picture(seed), *words]),
    llava.collate,
    cls_of,
)
NEXT = Family(
    llava_next.tiny_llava_next,
    lambda seed, words: llava_next.Prompt([llava_next.BOS, next_picture(seed), *words]),
    llava_next.collate,
    cls_of_next,
)
FAMILIES = pytest.mark.parametrize("family", [LLAVA, NEXT], ids=["llava", "llava-next"])


def samples(count: int = 7) -> list[Sample]:
    """Questions of different lengths, two about each picture."""
    return [
        Sample(
            id=str(n),
            image=Image.new("RGB", (1, 1), (n // 2, 0, 0)),
            question=" ".join(str(13 + 2 * (n + word)) for word in range(1 + n % 3)),
            group=f"picture {n // 2}",
        )
        for n in range(count)
    ]


def measure(family: Family, **options: Any) -> Consistency:
    options = {"text": lambda words: words, "max_new_tokens": LONGEST, **options}
    return consistency(family.model(), family.processor, samples(), **options)  # type: ignore[arg-type]


@dataclass
class Eager:
    """One question, alone: its answer, and what full maps say.

    Attributes:
        text: the answer, without its end.
        asked: by whose attention: of each layer, one number for each patch.
        share: by whose attention: of each layer, how much goes to the picture.
    """

    text: list[int]
    asked: dict[str, list[list[float]]]
    share: dict[str, list[float]]


@torch.no_grad()
def eager(family: Family, model: Any, sample: Sample) -> Eager:
    inputs = family.processor(
        [sample.picture()],
        [sample.question],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    width = inputs["input_ids"].shape[1]
    said = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)[0, width:].tolist()
    text = said[: next((n for n, each in enumerate(said) if each in ENDS), LONGEST)]
    ids = torch.cat([inputs["input_ids"], torch.tensor([text], dtype=torch.int64)], 1)
    whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    maps = model(**whole, output_attentions=True, use_cache=False).attentions
    visual = (inputs["input_ids"][0] == llava.IMAGE).nonzero()[:, 0].tolist()
    if family is NEXT:
        packed = next_picture(sample.picture().getpixel((0, 0))[0]).packed
        visual = [slot for slot, token in zip(visual, packed, strict=True) if token is not None]
    queries = {"last": [width - 1], "output": list(range(width, width + len(text)))}
    asked = {
        name: [layer[0][:, which][:, :, visual].mean((0, 1)).tolist() for layer in maps]
        for name, which in queries.items()
        if which
    }
    share = {name: [math.fsum(layer) for layer in layers] for name, layers in asked.items()}
    return Eager(text, asked, share)


def close(got: Any, values: list[float], groups: list[str], tolerance: float) -> None:
    """A mean, and its standard error from sums over pictures, by the formula of a ratio."""
    assert got.questions == len(values)
    average = statistics.fmean(values)
    assert got.value == pytest.approx(average, abs=tolerance)
    sums = [
        sum(v - average for v, g in zip(values, groups, strict=True) if g == name)
        for name in dict.fromkeys(groups)
    ]
    count = len(sums)
    error = math.sqrt(count / (count - 1) * sum(each**2 for each in sums)) / len(values)
    assert got.error == pytest.approx(error, abs=tolerance)


@FAMILIES
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_everything_is_what_full_maps_say(family: Family, batch: int) -> None:
    """Alone and in left-padded batches whose answers end at different tokens."""
    keeps = [4, 0.25]
    result = measure(family, batch=batch, keeps=keeps)
    model = family.model("eager")
    asked = samples()
    found = [eager(family, model, sample) for sample in asked]
    lengths = [len(one.text) for one in found]
    assert len(set(lengths)) > 2
    assert result.answer == pytest.approx(statistics.fmean(lengths))
    seeds = [sample.picture().getpixel((0, 0))[0] for sample in asked]  # type: ignore[index]
    patches = [len(one.asked["last"][0]) for one in found]
    assert result.tokens == pytest.approx(statistics.fmean(patches))
    names = {1: "cls-attention(layers=1)", 2: "cls-attention(layers=2)", 3: "cls-attention"}
    assert result.scorers[:3] == tuple(names.values())
    for queries in ("output", "last"):
        known = [n for n, one in enumerate(found) if queries in one.asked]
        groups = [asked[n].group for n in known]
        share = result.curve("", "share", queries)  # type: ignore[arg-type]
        for layer in range(3):
            close(
                share.layers[layer], [found[n].share[queries][layer] for n in known], groups, 1e-5
            )
        for count, name in names.items():
            cls = [family.cls(model, seed, count).tolist() for seed in seeds]
            llm = [found[n].asked.get(queries, []) for n in range(len(found))]
            related = [[plain_correlation(cls[n], row) for row in llm[n]] for n in known]
            curve = result.curve(name, "correlation", queries)  # type: ignore[arg-type]
            for layer in range(3):
                close(curve.layers[layer], [each[layer] for each in related], groups, 1e-5)
            close(curve.mean, [statistics.fmean(each) for each in related], groups, 1e-5)
            for keep in keeps:
                shared = [[plain_overlap(cls[n], row, keep) for row in llm[n]] for n in known]
                curve = result.curve(name, "overlap", queries, keep)  # type: ignore[arg-type]
                for layer in range(3):
                    close(curve.layers[layer], [each[layer] for each in shared], groups, 1e-9)


def test_an_answer_without_tokens_asks_nothing_but_its_prompt_does() -> None:
    model = LLAVA.model()
    model.generation_config.eos_token_id = list(range(98))
    ask: Any = {"text": lambda words: words, "max_new_tokens": 2, "keeps": [3]}
    result = consistency(model, LLAVA.processor, samples(4), ["cls-attention"], **ask)  # type: ignore[arg-type]
    assert result.answer == 0
    assert result.curve("cls-attention", "correlation").mean.questions == 0
    assert math.isnan(result.curve("cls-attention", "overlap").layers[0].value)
    assert result.curve("cls-attention", "correlation", "last").mean.questions == 4


def test_output_attention_is_the_mean_of_each_answers_own_steps() -> None:
    steps = torch.rand(4, 3, 2, 5)
    got = output_attention(steps, [1, 3, 0])
    torch.testing.assert_close(got[0], steps[1, 0])
    torch.testing.assert_close(got[1], (steps[1, 1] + steps[2, 1] + steps[3, 1]) / 3)
    assert got[2].isnan().all()
    with pytest.raises(ShapeError, match="3 images and more than 4 steps, got"):
        output_attention(steps, [1, 4, 0])


def test_scorers_at_other_placements_and_objects() -> None:
    """FastV's score of layer 2 is what the last token of the prompt attends to there."""
    fastv = "fastv | evict(4) @ after-layer"
    stage = tokenprune.parse(fastv)
    given = [stage, ClsAttentionScorer(layers=1), "random(seed=3)", "vtc-cls(keep=9)"]
    result = measure(LLAVA, scorers=given, keeps=[4])
    names = (fastv, "cls-attention(layers=1)", "random(seed=3)", "vtc-cls(keep=9)", "random")
    assert result.scorers == names
    assert result.curve(fastv, "overlap", "last").layers[1].value == 1
    assert result.curve(fastv, "correlation", "last").layers[1].value == pytest.approx(1)
    assert result.curve(fastv, "correlation", "last").layers[0].value < 0.9
    whole = measure(LLAVA, keeps=[4])
    mine, theirs = (
        one.curve(name, "correlation").layers[1].value
        for one, name in ((result, "vtc-cls(keep=9)"), (whole, "cls-attention"))
    )
    assert mine == pytest.approx(theirs, abs=1e-6)


def test_specs_of_scorers() -> None:
    assert scorer_of("random(seed=2)") == (RandomScorer(2), tokenprune.BeforeLLM())
    assert scorer_of("fastv @ after-layer(3)")[1] == AfterLayer(3)
    assert scorer_of("cls-attention(layers=2) | evict(4)")[0] == ClsAttentionScorer(2)
    with pytest.raises(SpecError, match="does not start with a scorer; scorers: .*cls-attention"):
        scorer_of("tome(0.5)")
    with pytest.raises(UnknownNameError, match="unknown strategy 'nope'"):
        scorer_of("nope(3)")


class Flat(Scorer):
    """Finds all tokens equal, or none a number."""

    def __init__(self, value: float) -> None:
        self.value = value

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        return torch.full(tokens.mask.shape, self.value)

    def __repr__(self) -> str:
        return f"Flat({self.value})"


def test_scores_that_say_nothing() -> None:
    """Their correlation is undefined, so it is left out; of random, nothing remains but chance."""
    result = measure(LLAVA, scorers=[Flat(0.5)], keeps=[4])
    assert result.curve("Flat(0.5)", "correlation").mean.questions == 0
    assert result.curve("Flat(0.5)", "overlap").mean.questions > 0
    with pytest.raises(tokenprune.ScoreError, match="must not be NaN"):
        measure(LLAVA, scorers=[Flat(math.nan)], keeps=[4])


def test_a_model_whose_adapter_cannot_tell_is_refused() -> None:
    from core.fakes import FakeAdapter, Model

    with pytest.raises(UnsupportedError, match="FakeAdapter cannot tell what a Model attends to"):
        FakeAdapter().watch(Model(), tokenprune.Attended())
    refused = pytest.raises(UnsupportedError, match="no adapter supports .*Linear")
    with refused, tokenprune.watch(nn.Linear(2, 2)):
        pass


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(DataError, match="at least one question"):
        consistency(LLAVA.model(), LLAVA.processor, [])  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="keep=0"):
        measure(LLAVA, keeps=[0])
    with pytest.raises(UnsupportedError, match="cannot supply PoolAttention"):
        measure(LLAVA, scorers=["pool-attention"])
    with pytest.raises(UnknownNameError, match="scorers: cls-attention, random; keep: 4"):
        measure(LLAVA, scorers=["cls-attention"], keeps=[4]).curve("other", "overlap")


def test_several_pictures_in_a_prompt_are_refused() -> None:
    twice = Family(
        llava.tiny_llava,
        lambda seed, words: llava.Row([llava.BOS, llava.picture(1), llava.picture(2), *words]),
        llava.collate,
        cls_of,
    )
    with pytest.raises(UnsupportedError, match="one picture in each prompt, but 7 prompts have 14"):
        measure(twice)


def test_files(tmp_path: Path) -> None:
    result = measure(LLAVA, keeps=[4, 0.5], name="tiny", data="made up")
    result.write(tmp_path)
    read = json.loads((tmp_path / "analyze.json").read_text())
    assert read["format"] == 1
    assert read["data"] == {"name": "made up", "questions": 7, "pictures": 4}
    # For both kinds of query: 2 overlaps and a correlation of each scorer, and a share.
    assert len(read["curves"]) == 2 * (3 * len(result.scorers) + 1)
    first = next(one for one in read["curves"] if one["measure"] == "correlation")
    known = result.curve(first["scorer"], "correlation", first["queries"])
    assert [each["value"] for each in first["layers"]] == [each.value for each in known.layers]
    drawn = plot(result, tmp_path)
    assert [path.name for path in drawn] == ["consistency.png", "over_k.png"]
    for path in drawn:
        picture = Image.open(path).convert("RGB")
        assert min(picture.size) > 300
        assert len(picture.getcolors(2**24) or []) > 50


def test_one_scorer_is_no_plot_over_k(tmp_path: Path) -> None:
    result = measure(LLAVA, scorers=["uniform", Flat(1.0)], keeps=[4])
    assert [path.name for path in plot(result, tmp_path)] == ["consistency.png"]


def test_deep_models_get_wider_plots(tmp_path: Path) -> None:
    result = measure(LLAVA, scorers=["cls-attention", "cls-attention(layers=1)"], keeps=[4])
    curves = [replace(curve, layers=curve.layers * 6) for curve in result.curves]
    shallow, _ = plot(result, tmp_path / "shallow")
    deep, _ = plot(replace(result, curves=tuple(curves)), tmp_path / "deep")
    assert Image.open(deep).width > Image.open(shallow).width
