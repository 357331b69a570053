"""Plain `forward` with stages after layers: logits, hidden states, losses, gradients, threads."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import tokenprune
from support.inside_oracle import Cut, Recompute, evict, greedy
from support.llava import BOS, IMAGE, PATCHES, Row, collate, generate, picture, prompts, tiny_llava
from support.outputs import cache_of
from tokenprune import AttachError, MissingSignalError, UnsupportedError

POSITIONS = pytest.mark.parametrize("positions", ["original", "reindexed"])
CUTS = ((1, 9, "cls"), (2, 4, "last"))
FASTV = "fastv | evict(4) @ after-layer(2)"
CLS = "cls-attention | evict(4) @ after-layer(2)"


def specs(positions: str = "original") -> list[str]:
    names = {"last": "fastv", "cls": "cls-attention"}
    return [
        f"{names[by]} | evict({keep}) @ after-layer({layer}, positions={positions!r})"
        for layer, keep, by in CUTS
    ]


def reader(model: Any, row: Row, positions: str = "original", **options: Any) -> Recompute:
    cuts = [Cut(layer, evict(keep, by), positions) for layer, keep, by in CUTS]
    return Recompute(model, row, cuts, **options)


def close(got: Tensor, wanted: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


@POSITIONS
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_hidden_states_and_logits_stand_at_logical_slots(
    llava: Any, positions: str, side: str, use_cache: bool, attention: str
) -> None:
    """A slot that was dropped shows the state of the last one kept before it."""
    model, inputs = llava(attention), collate(prompts(), side)
    with tokenprune.attach(model, *specs(positions)):
        out = model(**inputs, use_cache=use_cache, output_hidden_states=True)
    assert out.logits.shape[:2] == inputs["input_ids"].shape
    for number, row in enumerate(prompts()):
        real = inputs["attention_mask"][number].bool()
        recompute = reader(model, row, positions)
        wanted = recompute.hidden()
        alive = {2: _alive(recompute, 1), 3: _alive(recompute, 2)}
        assert len(out.hidden_states) == len(wanted) == 4
        for layer, (got, states) in enumerate(zip(out.hidden_states, wanted, strict=True)):
            assert got.shape == (*inputs["input_ids"].shape, 32)
            left = alive.get(layer, list(range(len(row.ids))))
            shown = [max(slot for slot in left if slot <= n) for n in range(len(row.ids))]
            close(got[number, real], states[shown])
        close(out.logits[number, real], model.lm_head(wanted[-1][shown]))


def _alive(recompute: Recompute, start: int) -> list[int]:
    """Slots left by the stage at `start`."""
    gone = set()
    for (number, _), (members, weights) in recompute.decided.items():
        if number <= start:
            gone |= {n for m, n in enumerate(members) if not weights[:, m].any()}
    return [n for n in range(len(recompute.images)) if n not in gone]


@torch.no_grad()
def test_logits_to_keep_in_a_plain_forward(llava: Any) -> None:
    model, inputs = llava(), collate(prompts())
    with tokenprune.attach(model, *specs()):
        full = model(**inputs).logits
        assert torch.equal(model(**inputs, logits_to_keep=3).logits, full[:, -3:])


@POSITIONS
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_that_of_the_shortened_prompt(llava: Any, positions: str, side: str) -> None:
    model = llava()
    with tokenprune.attach(model, *specs(positions)), torch.no_grad():
        got = model(**collate(prompts(), side, labels=True)).loss
    with torch.no_grad():
        close(got, _loss(model, positions), atol=2e-6)
        assert (got - model(**collate(prompts(), side, labels=True)).loss).abs() > 0.01


def _loss(model: Any, positions: str) -> Tensor:
    """Mean cross entropy of all text but BOS, each word told from the slot left before it."""
    losses = []
    for row in prompts():
        recompute = reader(model, row, positions)
        states = recompute.hidden()[-1]
        for slot, token in enumerate(row.ids):
            if token in (IMAGE, BOS):
                continue
            before = max(n for n in recompute.alive if n < slot)
            losses.append(-model.lm_head(states[before]).log_softmax(-1)[token])
    return torch.stack(losses).mean()


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


@POSITIONS
def test_gradients_are_those_of_the_shortened_prompt(positions: str) -> None:
    model = tiny_llava()
    wanted = _gradients(model, _loss(model, positions))
    model.train()
    with tokenprune.attach(model, *specs(positions)):
        got = _gradients(model, model(**collate(prompts(), labels=True)).loss)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    for name in ("multi_modal_projector.linear_1", "layers.0.self_attn.q_proj", "layers.2.mlp.up"):
        assert any(name in each and wanted[each].abs().max() > 1e-3 for each in wanted), name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("merging", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, merging: bool) -> None:
    stages = ["tome(5) @ after-layer(1)", FASTV] if merging else specs()
    plain = tiny_llava().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    inputs = collate(prompts(), labels=True)
    results = []
    for model in (plain, checkpointed):
        with tokenprune.attach(model, *stages):
            results.append(_gradients(model, model(**inputs, use_cache=False).loss))
    for name, gradient in results[0].items():
        if "embed_tokens" in name or "vision" in name:
            continue  # what requires gradients differs by enable_input_require_grads
        torch.testing.assert_close(results[1][name], gradient, rtol=0, atol=0, msg=name)


@torch.no_grad()
def test_a_manual_loop_without_masks(llava: Any) -> None:
    """Rows of one length need no mask; nobody passes position ids either."""
    model = llava()
    batch = [Row([BOS, 5, picture(1), 6, 7, 8]), Row([BOS, 9, 10, picture(2), 11, 12])]
    cuts = [Cut(layer, evict(keep, by)) for layer, keep, by in CUTS]
    text, logits = greedy(model, batch, cuts)
    inputs = collate(batch)
    with tokenprune.attach(model, *specs()):
        out = model(inputs["input_ids"], inputs["pixel_values"])
        for step in range(text.shape[1]):
            close(out.logits[:, -1], logits[:, step])
            out = model(input_ids=text[:, step : step + 1], past_key_values=out.past_key_values)


def test_threads_do_not_mix(llava: Any) -> None:
    model = llava()
    batches = [[Row([BOS, 5 + n, picture(n), 6, 7]), prompts()[n % 3]] for n in range(6)]

    def answer(batch: list[Row]) -> Tensor:
        return generate(model, collate(batch), steps=3).logits

    with tokenprune.attach(model, *specs(), "cls-attention | evict(12) @ before-llm"):
        wanted = [answer(batch) for batch in batches]
        with ThreadPoolExecutor(3) as pool:
            for _ in range(3):
                for got, each in zip(pool.map(answer, batches), wanted, strict=True):
                    close(got, each)


@torch.no_grad()
@pytest.mark.parametrize("scorer", ["random", "cls-attention"])
def test_threads_with_many_images_do_not_make_each_other_forget(llava: Any, scorer: str) -> None:
    model = llava()
    batches = [[Row([BOS, picture(100 * n + row), 5]) for row in range(33)] for n in (0, 1)]
    together = threading.Barrier(2)

    def answer(batch: list[Row]) -> Tensor:
        return model(**collate(batch)).logits[:, -1]

    def wait(*_: object) -> None:
        """Both have encoded their images before either asks what is known of them."""
        together.wait(timeout=60)

    with tokenprune.attach(model, f"{scorer} | evict(4) @ after-layer(1)"):
        wanted = [answer(batch) for batch in batches]
        handle = model.model.language_model.register_forward_pre_hook(wait)
        try:
            with ThreadPoolExecutor(2) as pool:
                for got, each in zip(pool.map(answer, batches), wanted, strict=True):
                    close(got, each)
        finally:
            handle.remove()


def test_detaching_restores_the_model(llava: Any) -> None:
    model = llava()
    vanilla = generate(model, collate(prompts()), steps=3)
    state = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with tokenprune.attach(model, *specs(), "cls-attention | evict(12) @ before-llm"):
        assert not torch.equal(generate(model, collate(prompts()), steps=3).logits, vanilla.logits)
    assert torch.equal(generate(model, collate(prompts()), steps=3).logits, vanilla.logits)
    for name, module in model.named_modules():
        assert module.__dict__.keys() == state[name].keys()


def test_an_exception_half_way_leaves_nothing_behind(llava: Any) -> None:
    model, inputs = llava(), collate(prompts())
    with tokenprune.attach(model, *specs()) as attachment:
        wanted = generate(model, inputs, steps=3)

        def interrupt(layer: object, args: object) -> None:
            raise KeyboardInterrupt

        handle = model.model.language_model.layers[2].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            generate(model, inputs)
        handle.remove()
        assert torch.equal(generate(model, inputs, steps=3).logits, wanted.logits)
        assert attachment.report.calls == 2


# ---------------------------------------------------------------------------- what is refused


def test_an_offloaded_cache_is_refused(llava: Any) -> None:
    cache = DynamicCache()
    cache.offloading = True  # its constructor wants a GPU
    with (
        tokenprune.attach(llava(), FASTV),
        pytest.raises(UnsupportedError, match="use a DynamicCache without offloading"),
    ):
        generate(llava(), collate(prompts()), past_key_values=cache)


def test_a_quantised_cache_is_refused(llava: Any) -> None:
    """By the kind of its layers; the packages that quantise need not be there."""
    from transformers.cache_utils import Cache, DynamicLayer

    class QuantisedLayer(DynamicLayer):
        pass

    model = llava()
    cache = Cache(layers=[QuantisedLayer() for _ in range(3)])
    with (
        tokenprune.attach(model, FASTV),
        pytest.raises(UnsupportedError, match="QuantisedLayer in Cache cannot hold a shortened"),
    ):
        generate(model, collate(prompts()), past_key_values=cache)


def test_text_only_batches_may_use_any_cache() -> None:
    model, texts = tiny_llava(), collate([Row([BOS, 31, 32, 33]), Row([BOS, 41, 42])])
    vanilla = generate(model, texts, cache_implementation="static", steps=3)
    with tokenprune.attach(model, FASTV):
        answer = generate(model, texts, cache_implementation="static", steps=3)
    assert torch.equal(answer.logits, vanilla.logits)


def test_custom_masks_are_refused(llava: Any) -> None:
    model, inputs = llava(), collate(prompts()[:1])
    width = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(1, 1, width, width).tril()
    with (
        tokenprune.attach(model, CLS),
        pytest.raises(UnsupportedError, match="4-D attention_mask that is not causal"),
    ):
        model(**inputs)


def test_embeddings_without_ids_are_refused(llava: Any) -> None:
    model, inputs = llava(), collate(prompts()[:1])
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    with (
        tokenprune.attach(model, CLS),
        pytest.raises(UnsupportedError, match="pass input_ids instead of inputs_embeds"),
    ):
        model(**inputs, inputs_embeds=embeds)


@torch.no_grad()
def test_features_of_unknown_origin(llava: Any) -> None:
    """Scores of the tower are refused for them; the LLM's own attention needs none."""
    model, inputs = llava(), collate(prompts()[:1])
    pixels = inputs.pop("pixel_values")
    encoded = model.model.get_image_features(pixels)
    wanted = Recompute(model, prompts()[0], [Cut(2, evict(4))]).logits([])
    with tokenprune.attach(model, FASTV):
        close(model(**inputs, mm_encoder_outputs={"image": encoded}).logits[0, -1], wanted)
    with (
        tokenprune.attach(model, CLS),
        pytest.raises(MissingSignalError, match="did not come from the attached vision tower"),
    ):
        model(**inputs, mm_encoder_outputs={"image": encoded})


@torch.no_grad()
def test_random_scores_tell_pictures_of_unknown_origin_apart(llava: Any) -> None:
    """By their features: two pictures of one batch keep other patches, twice the same ones."""
    model = llava()
    inputs = collate([Row([BOS, picture(seed), 11]) for seed in (1, 2)])
    encoded = model.model.get_image_features(inputs.pop("pixel_values"))
    with tokenprune.attach(model, "random | evict(4) @ after-layer(1)") as attachment:
        kept = []
        for _ in range(2):
            model(**inputs, mm_encoder_outputs={"image": encoded})
            kept.append(attachment.report.kept)
    first, second = kept[0]
    assert first != second
    assert kept[0] == kept[1]


def test_reduced_features_need_the_whole_model(llava: Any) -> None:
    model, inputs = llava(), collate(prompts()[:1])
    with tokenprune.attach(model, CLS, "cls-attention | evict(9) @ before-llm"):
        features = model.model.get_image_features(inputs["pixel_values"]).pooler_output
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds = torch.where((inputs["input_ids"] == IMAGE)[..., None], features[0][:1], embeds)
        embeds[0, 3 : 3 + PATCHES] = features[0]
        with pytest.raises(UnsupportedError, match="call the whole model"):
            model.model.language_model(inputs_embeds=embeds)


def test_a_signal_of_layers_with_other_tokens_is_refused(llava: Any) -> None:
    from tokenprune import AfterLayer, Evict, LastQueryAttention, Scorer, Strategy

    class Early(Scorer):
        @property
        def signals(self) -> frozenset[Any]:
            return frozenset({LastQueryAttention(layers=(0,))})

        def score(self, tokens: Any, signals: Any) -> Tensor:
            return signals[LastQueryAttention(layers=(0,))].mean((1, 2))

    model = llava()
    late = Strategy(Early(), Evict(4)).at(AfterLayer(2))
    with tokenprune.attach(model, late):
        pass
    with pytest.raises(UnsupportedError, match="must name layers that have run on the same tokens"):
        tokenprune.attach(model, late, "fastv | evict(8) @ after-layer(1)")


def test_two_stages_at_one_place_are_refused(llava: Any) -> None:
    with pytest.raises(UnsupportedError, match="join them into one: fastv | evict"):
        tokenprune.attach(llava(), FASTV, CLS)


def test_fastv_before_the_llm_is_refused(llava: Any) -> None:
    with pytest.raises(UnsupportedError, match="cannot supply LastQueryAttention"):
        tokenprune.attach(llava(), "fastv | evict(4) @ before-llm")


def test_an_attached_model_cannot_be_copied(llava: Any) -> None:
    model = llava()
    with (
        tokenprune.attach(model, FASTV),
        pytest.raises(AttachError, match="detach before copying"),
    ):
        copy.deepcopy(model)


@torch.no_grad()
def test_one_token_less_in_the_whole_batch_is_one_less(llava: Any) -> None:
    """A stage that drops a single token of a single picture has not kept all."""
    model, row = llava(), prompts()[0]
    spec = f"cls-attention | evict({PATCHES - 1}) @ after-layer(1)"
    with tokenprune.attach(model, spec) as attachment:
        out = model(**collate([row]), use_cache=True)
    cuts = [Cut(1, evict(PATCHES - 1, "cls"), "original")]
    close(out.logits[0, -1], Recompute(model, row, cuts).logits([]))
    assert attachment.report.layers == ((0, PATCHES), (1, PATCHES - 1))
    lengths = [layer.keys.shape[2] for layer in cache_of(out).layers]
    assert lengths == [len(row.ids)] + [len(row.ids) - 1] * 2
