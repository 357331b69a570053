"""The view of a config by which attention is read: one attribute of the attentions that are read.

No config changes, so what is saved, shared, nested or looked up meanwhile is what it always is.
"""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import tokenprune
from support.flash import flash_attention
from support.llava import collate, prompts, tiny_llava
from tokenprune import AttachError
from tokenprune.testing.snapshot import Snapshot
from tokenprune_adapters.hf.attention import Asked, ConfigView, ReadAttention

from ..conftest import MakeLlava

FASTV = "fastv | evict(4) @ after-layer(2)"


def attention(model: Any, layer: int) -> Any:
    return model.model.language_model.layers[layer].self_attn


def test_attaching_sets_the_view_and_an_untraced_encoder_and_detaching_takes_it_away(
    llava: MakeLlava,
) -> None:
    model = llava()
    before, own = Snapshot(model), attention(model, 1).config
    with tokenprune.attach(model, FASTV):
        changed = before.differences(hooks=False)
        view = "model.language_model.layers.1.self_attn.config"
        assert set(changed) == {view, "model.get_image_features"}
        assert attention(model, 1).config.hidden_size == own.hidden_size
    assert before.differences() == []
    assert attention(model, 1).config is own


def test_the_config_is_saved_as_it_is(llava: MakeLlava, tmp_path: Path) -> None:
    model = llava()
    with torch.no_grad():
        stock = model(**collate(prompts())).logits
        with tokenprune.attach(model, FASTV), tokenprune.watch(model):
            assert model.config._attn_implementation == "sdpa"
            assert "tokenprune" not in str(model.config.to_dict())
            model.save_pretrained(tmp_path)
        assert "tokenprune" not in (tmp_path / "config.json").read_text("utf-8")
        again = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
        assert torch.equal(again(**collate(prompts())).logits, stock)


@torch.no_grad()
def test_models_that_share_a_config_are_attached_apart(llava: MakeLlava) -> None:
    """One attached, one not, one watched; configs are nested in each other, and one object."""
    one, inputs = tiny_llava(), collate(prompts())
    other = LlavaForConditionalGeneration(one.config).eval()
    other.load_state_dict(one.state_dict())
    assert other.model.language_model.config is one.model.language_model.config
    stock = one(**inputs).logits
    with tokenprune.attach(one, FASTV) as attached:
        pruned = one(**inputs).logits
        assert torch.equal(other(**inputs).logits, stock)
        with tokenprune.watch(other) as seen:
            assert torch.equal(other(**inputs).logits, stock)
        assert torch.equal(one(**inputs).logits, pruned)
    assert attached.last.plan.lengths == (4, 4, 4)
    assert seen.steps.shape[:2] == (1, 3)
    assert torch.equal(one(**inputs).logits, stock)


@torch.no_grad()
def test_a_kernel_chosen_while_attached_is_used(llava: MakeLlava) -> None:
    model, inputs = llava(), collate(prompts())
    with tokenprune.attach(model, FASTV) as attachment:
        model.set_attn_implementation("eager")
        try:
            got = model(**inputs).logits
            scores = attachment.last.scores
        finally:
            model.set_attn_implementation("sdpa")
        wanted = model(**inputs).logits
    assert attention(model, 1).config._attn_implementation == "sdpa"
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
    torch.testing.assert_close(scores, attachment.last.scores, rtol=0, atol=1e-6)


@torch.no_grad()
def test_flash_attention_gets_what_it_always_does() -> None:
    """The kernel looks its name up in the attention's config once more."""
    model, inputs = tiny_llava(), collate(prompts())
    with tokenprune.attach(model, FASTV) as attachment:
        model(**inputs)
        wanted = attachment.last.scores
    seen: list[str] = []
    with flash_attention(model):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        kernel = ALL_ATTENTION_FUNCTIONS["fake_flash"]

        def noting(module: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(module.config._attn_implementation)
            return kernel(module, *args, **kwargs)

        ALL_ATTENTION_FUNCTIONS.register("fake_flash", noting)
        with tokenprune.attach(model, FASTV) as attachment:
            model(**inputs)
    assert set(seen) == {"fake_flash"}
    torch.testing.assert_close(attachment.last.scores, wanted, rtol=0, atol=1e-6)


def test_threads_read_their_own_calls(llava: MakeLlava) -> None:
    model = llava()
    batches = [collate(prompts()[n : n + 1]) for n in (0, 1)]
    with tokenprune.attach(model, FASTV), torch.no_grad():
        alone = [model(**batch).logits for batch in batches]
        wrong: list[float] = []

        def run(number: int) -> None:
            with torch.no_grad():
                for _ in range(8):
                    got = model(**batches[number]).logits
                    wrong.append(float((got - alone[number]).abs().max()))

        threads = [threading.Thread(target=run, args=(n,)) for n in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(wrong) == 16
    assert max(wrong) < 1e-5


def test_what_an_exception_left_behind_is_not_read(llava: MakeLlava) -> None:
    """A pass that breaks between asking and reading, then a longer one, then decoding."""
    model = llava()
    layer = model.model.language_model.layers[1]
    inputs = collate(prompts())
    with tokenprune.attach(model, FASTV), torch.no_grad():
        wanted = model(**inputs).logits

        def fail(*args: object) -> None:
            raise RuntimeError("out of memory")

        handle = layer.self_attn.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(**collate(prompts()[:1]))
        handle.remove()
        text = {"input_ids": torch.tensor([[1, 5, 6]])}
        model(**text)
        assert torch.equal(model(**inputs).logits, wanted)


@torch.no_grad()
def test_one_call_is_read_and_no_more(llava: MakeLlava) -> None:
    model = llava()
    layer, hidden = model.model.language_model.layers[1], torch.randn(1, 3, 32)
    rotary = model.model.language_model.rotary_emb(hidden, torch.arange(3)[None])
    reading = ReadAttention(layer)
    seen: list[Asked] = []
    handles = list(reading.install())
    reading.ask(seen.append)
    for _ in range(2):
        layer.self_attn(hidden, position_embeddings=rotary, attention_mask=None)
    for handle in handles:
        handle.remove()
    assert [asked.query.shape for asked in seen] == [(1, 4, 3, 8)]


@torch.no_grad()
def test_without_a_scale_of_its_own_an_attention_has_the_usual_one() -> None:
    model, inputs = tiny_llava(), collate(prompts())
    with tokenprune.attach(model, FASTV) as attachment:
        wanted = model(**inputs).logits
        scores = attachment.last.scores
        for layer in model.model.language_model.layers:
            layer.self_attn.scaling = None  # kernels divide by the root of the channels then
        assert torch.equal(model(**inputs).logits, wanted)
        torch.testing.assert_close(attachment.last.scores, scores, rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_last_who_reads_takes_the_view_away(llava: MakeLlava) -> None:
    model, inputs = llava(), collate(prompts())
    own = attention(model, 1).config
    with tokenprune.watch(model) as seen:
        attachment = tokenprune.attach(model, FASTV)
        attachment.detach()
        assert attention(model, 1).config is not own
        model(**inputs)
    assert seen.steps.shape[:3] == (1, 3, 3)
    assert attention(model, 1).config is own


def test_a_view_is_not_copied(llava: MakeLlava) -> None:
    model = llava()
    with tokenprune.attach(model, FASTV):
        assert isinstance(attention(model, 1).config, ConfigView)
        with pytest.raises(AttachError, match="detach before copying"):
            copy.deepcopy(model)
