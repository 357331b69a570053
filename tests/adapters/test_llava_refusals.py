"""What cannot be served is refused in words: what was asked, what was got, what would work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, MistralConfig

import tokenprune
from support.llava import (
    PATCHES,
    Row,
    collate,
    generate,
    prompts,
    pruned,
    scale,
    spec,
    tiny_llava,
)
from support.oracle import greedy_batch
from tokenprune import (
    BudgetError,
    Evict,
    MissingSignalError,
    Placement,
    RandomScorer,
    SpecError,
    Strategy,
    UnknownNameError,
    UnsupportedError,
)

from .conftest import MakeLlava, leftovers


def refused(model: nn.Module, stages: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        tokenprune.attach(model, *([stages] if isinstance(stages, str) else stages))
    assert leftovers(model) == []


@pytest.fixture(scope="module")
def siglip() -> LlavaForConditionalGeneration:
    return tiny_llava(tower="siglip", select="full")


def test_a_tower_without_cls_lists_scorers_that_work(siglip: nn.Module) -> None:
    words = (
        r"cannot supply ClsAttention to .cls-attention.*Scorers that work here: .*random.*uniform"
    )
    refused(siglip, spec(4), UnsupportedError, words)
    with pytest.raises(UnsupportedError) as caught:
        tokenprune.attach(siglip, spec(4))
    assert "cls-attention" not in str(caught.value).rpartition("work here:")[2]


@pytest.mark.parametrize(
    ("tower", "scorer"),
    [
        *product(("siglip", "clip"), ("random", "random(seed=3)", "uniform")),
        ("siglip", "received-attention"),
        ("siglip", "pool-attention"),
    ],
)
def test_those_scorers_do_work(siglip: Any, llava: MakeLlava, scorer: str, tower: str) -> None:
    model = siglip if tower == "siglip" else llava()
    with tokenprune.attach(model, f"{scorer} | evict(4) @ before-llm") as attachment:
        answer = generate(model, collate(prompts()))
        kept = attachment.last.plan.anchors.tolist()
    chosen = iter(kept)
    text, logits = zip(
        *(greedy_batch(model, [row], [next(chosen) for _ in row.images]) for row in prompts()),
        strict=True,
    )
    assert all(len(each) == 4 for each in kept)
    assert torch.equal(answer.text, torch.cat(text))
    torch.testing.assert_close(answer.logits, torch.cat(logits), rtol=0, atol=1e-5)
    assert next(chosen, None) is None


@pytest.mark.parametrize(
    ("tower", "select", "words"),
    [
        ("clip", "full", r"'full' keeps \[CLS\] among the patches; only 'default' is supported"),
        ("siglip", "default", "drops the first patch of a Siglip.*; only 'full' is supported"),
    ],
)
def test_a_select_strategy_that_does_not_fit_the_tower(tower: str, select: str, words: str) -> None:
    model = tiny_llava(tower=tower, select=select)
    refused(model, "random | evict(4) @ before-llm", UnsupportedError, words)


def test_a_model_without_adapter_lists_the_supported() -> None:
    words = (
        "no adapter supports torch.*Linear as a model; supported: of transformers .*LlavaForCond"
    )
    refused(nn.Linear(2, 2), spec(4), UnsupportedError, words)


def test_a_model_without_its_head_is_told_where_the_head_is() -> None:
    words = "modeling_llava.LlavaModel as a model; take the whole model, LlavaForConditionalGenerat"
    refused(tiny_llava().model, spec(4), UnsupportedError, words)


@dataclass(frozen=True)
class _BeforeLunch(Placement):
    def check(self, steps: Sequence[object]) -> None:
        """Any steps may stand here."""


def test_a_placement_that_is_not_offered_lists_those_that_are(llava: MakeLlava) -> None:
    stage = Strategy(RandomScorer(), Evict(4)).at(_BeforeLunch())
    words = "does not offer .*; it offers 'before-llm'"
    refused(llava(), [stage], UnsupportedError, words)


def _mistral(window: int | None) -> LlavaForConditionalGeneration:
    like = tiny_llava().config
    text = MistralConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=like.vision_config,
        text_config=text,
        image_token_id=like.image_token_id,
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
    )
    model = LlavaForConditionalGeneration(config).eval()
    scale(model, torch.Generator().manual_seed(0))
    return model


def test_a_language_model_with_a_sliding_window(llava: MakeLlava) -> None:
    words = "MistralModel has sliding.* layers.*; only full attention is supported"
    refused(_mistral(window=8), spec(4), UnsupportedError, words)


def test_the_same_without_a_window_works() -> None:
    model = _mistral(window=None)
    text, logits = greedy_batch(model, prompts(), 4)
    answer = pruned(model, collate(prompts()), 4)
    assert torch.equal(answer.text, text)
    torch.testing.assert_close(answer.logits, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (0, "keep=0 leaves no visual token before the LLM; keep at least 1"),
        (-3, "a count of tokens to keep must be >= 0, got -3"),
        (1.5, r"a fraction to keep must be in \(0, 1\], got 1.5; write a count"),
        (0.0, r"a fraction to keep must be in \(0, 1\], got 0.0"),
        (-0.5, r"a fraction to keep must be in \(0, 1\], got -0.5"),
    ],
)
def test_budgets(llava: MakeLlava, keep: float, words: str) -> None:
    refused(llava(), spec(keep), BudgetError, words)
    refused(llava(), f"vtc-cls(keep={keep})", BudgetError, words)


@pytest.mark.parametrize(
    ("stages", "error", "words"),
    [
        ("cls-atention | evict(4)", UnknownNameError, "cls-atention.*known.*cls-attention"),
        ("cls-attention | evict(4) @ before-lunch", UnknownNameError, "before-lunch.*before-llm"),
        ("evict(4) @ before-llm", SpecError, "no scorer stands before"),
        ("cls-attention @ before-llm", SpecError, "ends with a reducer"),
        ("", SpecError, "a stage or step is missing in .*; a spec looks like"),
        (
            "random | evict(8) @ before-llm; uniform | evict(4) @ before-llm",
            UnsupportedError,
            r"2 stages before the LLM; join them into one: random \| evict\(8\) \| uniform",
        ),
        ("random | evict(4, per='frame') @ before-llm", UnsupportedError, "has no frames"),
    ],
)
def test_specs(llava: MakeLlava, stages: str, error: type[Exception], words: str) -> None:
    refused(llava(), stages, error, words)


def test_no_stages(llava: MakeLlava) -> None:
    refused(llava(), [], SpecError, "attach needs at least one stage, e.g. attach")
    refused(llava(), [4], SpecError, "a stage must be a spec or a Stage, got 4")


def test_features_of_the_embeddings() -> None:
    refused(tiny_llava(feature_layer=0), spec(4), UnsupportedError, "reads the embeddings")


def _call(**options: Any) -> Callable[[Any], Any]:
    @torch.no_grad()
    def call(model: Any) -> Any:
        return model(**(collate(prompts()) | options))

    return call


@torch.no_grad()
def _project(model: Any) -> Any:
    return model.model.multi_modal_projector(torch.zeros(1, PATCHES, 32))


_FOUR_D = torch.ones(3, 1, 41, 41, dtype=torch.bool)


@pytest.mark.parametrize(
    ("use", "error", "words"),
    [
        (_call(attention_mask=_FOUR_D), UnsupportedError, "4-D attention_mask that is not causal"),
        (_call(attention_mask=_FOUR_D[:, 0]), UnsupportedError, r"got \(3, 41, 41\); custom masks"),
        (_call(vision_feature_layer=-1), UnsupportedError, "configured vision_feature_layer; set"),
        (_call(vision_feature_select_strategy="full"), UnsupportedError, "17 tokens per image wh"),
        (
            _call(position_ids=torch.zeros(3, 3, 41, dtype=torch.int64)),
            UnsupportedError,
            r"position_ids must .*\(batch tokens\).*got \(3, 3, 41\)",
        ),
        (_project, MissingSignalError, "projector ran without the vision tower.*or detach"),
    ],
    ids=["4-D mask", "3-D mask", "layer", "select", "positions", "projector"],
)
def test_calls_that_cannot_be_served(
    use: Callable[[Any], Any], error: type[Exception], words: str
) -> None:
    model = tiny_llava()
    with tokenprune.attach(model, spec(4)):
        with pytest.raises(error, match=words):
            use(model)
        again = generate(model, collate(prompts()))
    assert torch.equal(again.text, greedy_batch(model, prompts(), 4)[0])


def test_attention_that_cannot_take_a_mask_of_ours(llava: MakeLlava) -> None:
    model = llava()
    config = model.model.language_model.config
    with tokenprune.attach(model, spec(4)):
        config._attn_implementation = "flex_attention"
        try:
            with pytest.raises(UnsupportedError, match=r"'flex_attention' cannot run.*'sdpa'"):
                generate(model, collate(prompts()))
        finally:
            config._attn_implementation = "sdpa"


def test_static_caches_serve_text() -> None:
    """An attached model refuses only what it cannot do."""
    # A model of its own: old transformers keep a static cache on it, even of a run that failed.
    model, texts = tiny_llava(), collate([Row([1, 31, 32]), Row([1, 41, 42])])
    options = {"cache_implementation": "static", "disable_compile": True}
    wanted = generate(model, texts, **options)
    got = pruned(model, texts, 4, **options)
    assert torch.equal(got.logits, wanted.logits)


@pytest.mark.parametrize("asked", [[-2, -3], [-3], -2])
def test_other_feature_layers_in_a_call_are_refused_where_several_are_configured(
    asked: Any,
) -> None:
    """Concatenated features don't tell which layers they are of."""
    model = tiny_llava(feature_layer=[-3, -2])
    inputs = collate(prompts())
    with torch.no_grad(), tokenprune.attach(model, spec(4)):
        for configured in ([-3, -2], (-3, -2)):
            model(**inputs, vision_feature_layer=configured)
        with pytest.raises(UnsupportedError, match="not those of the configured vision_feature_la"):
            model(**inputs, vision_feature_layer=asked)
        with pytest.raises(UnsupportedError, match="not those of the configured vision_feature_la"):
            model.generate(**inputs, vision_feature_layer=asked, max_new_tokens=1)


@pytest.mark.parametrize("asked", [[-3], -3])
def test_another_feature_layer_in_a_call_is_refused(llava: MakeLlava, asked: Any) -> None:
    model = llava()
    with torch.no_grad(), tokenprune.attach(model, spec(4)):
        model(**collate(prompts()), vision_feature_layer=-2)
        with pytest.raises(UnsupportedError, match="not those of the configured vision_feature_la"):
            model(**collate(prompts()), vision_feature_layer=asked)


def hiding(slots: slice) -> dict[str, Tensor]:
    """A batch of one prompt whose mask hides some slots of its picture, which is at slot 3."""
    inputs = collate(prompts()[:1])
    inputs["attention_mask"][0, slots] = 0
    return inputs


def test_budget_is_not_spent_in_silence_on_patches_that_a_mask_hides(llava: MakeLlava) -> None:
    model = llava()
    inputs = hiding(slice(3, 3 + PATCHES))
    stock = model(**inputs).logits
    with torch.no_grad():
        refused = pytest.raises(UnsupportedError, match="hides visual tokens that were kept")
        with tokenprune.attach(model, spec(4)), refused:
            model(**inputs)
        with tokenprune.attach(model, spec(PATCHES)):
            assert torch.equal(model(**inputs).logits[:, -3:], stock[:, -3:])


@pytest.mark.parametrize("scorer", ["uniform", "cls-attention", "fastv"])
def test_after_a_layer_patches_that_a_mask_hides_are_not_counted(
    llava: MakeLlava, scorer: str
) -> None:
    """Those that are seen get the whole budget, as if the others were not there."""
    model = llava()
    hidden = slice(5, 11)  # patches 2 to 7
    inputs = hiding(hidden)
    places = inputs["attention_mask"].cumsum(1) - 1
    with torch.no_grad():
        stock = model(**inputs, position_ids=places).logits
        with tokenprune.attach(model, f"{scorer} | evict(16) @ after-layer(1)") as whole:
            got = model(**inputs, position_ids=places).logits
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(got[real], stock[real], rtol=0, atol=2e-5)
        with tokenprune.attach(model, f"{scorer} | evict(4) @ after-layer(1)") as some:
            model(**inputs, position_ids=places)
    assert whole.last.plan.lengths == (10,)
    assert some.last.plan.lengths == (4,)
    patches = some.last.tokens.patches[0].tolist()
    assert not set(patches) & set(range(2, 8))


def test_a_picture_that_a_mask_hides_altogether(llava: MakeLlava) -> None:
    """Beside one that is seen: nothing is left of it, and nothing is spent on it."""
    model = llava()
    inputs = collate(prompts()[1:2])  # pictures at slots 2 and 21
    inputs["attention_mask"][0, 2 : 2 + PATCHES] = 0
    with torch.no_grad(), tokenprune.attach(model, "uniform | evict(4) @ after-layer(1)") as a:
        model(**inputs)
    assert a.last.plan.lengths == (0, 4)


@torch.no_grad()
@pytest.mark.parametrize("hidden", ["dropped", "kept"])
def test_a_mask_may_hide_what_was_dropped_but_not_what_was_kept(
    llava: MakeLlava, hidden: str
) -> None:
    model, inputs = llava(), collate(prompts()[:1])
    with tokenprune.attach(model, "uniform | evict(4)") as attachment:
        wanted = model(**inputs).logits[:, -1]
        kept = set(attachment.report.kept[0].patch)
        patch = min(kept if hidden == "kept" else set(range(PATCHES)) - kept)
        inputs = hiding(slice(3 + patch, 4 + patch))
        if hidden == "kept":
            with pytest.raises(UnsupportedError, match="hides visual tokens that were kept"):
                model(**inputs)
        else:
            assert torch.equal(model(**inputs).logits[:, -1], wanted)
