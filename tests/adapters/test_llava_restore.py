"""Whatever happens, detaching gives the model back as it was; and attaching is never doubled."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

import tokenprune
from support.llava import Row, collate, generate, picture, prompts, pruned, spec, tiny_llava
from support.oracle import greedy_batch
from tokenprune import AttachError, Removable
from tokenprune_adapters.hf.encoder_tower import ClipTowerAdapter

from .conftest import MakeLlava, leftovers


class Snapshot:
    """Everything of a model that attaching could touch."""

    def __init__(self, model: Any) -> None:
        self.model = model
        # transformers installs hooks of its own at the first run: let it.
        self.before = generate(model, collate(prompts()))
        self.attributes = self._attributes()
        self.state = {name: (t, t.clone()) for name, t in model.state_dict().items()}

    def _attributes(self) -> list[tuple[str, list[str], int, int]]:
        return [
            (
                name,
                sorted(module.__dict__),
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
            )
            for name, module in self.model.named_modules()
        ]

    def check(self) -> None:
        assert leftovers(self.model) == []
        assert self._attributes() == self.attributes
        after = self.model.state_dict()
        assert list(after) == list(self.state)
        for name, (same, value) in self.state.items():
            assert after[name].data_ptr() == same.data_ptr(), name
            assert torch.equal(after[name], value), name
        again = generate(self.model, collate(prompts()))
        assert torch.equal(again.logits, self.before.logits)
        assert torch.equal(again.text, self.before.text)


@pytest.fixture
def snapshot(llava: MakeLlava) -> Snapshot:
    return Snapshot(llava())


def test_leaving_the_context(snapshot: Snapshot) -> None:
    few = pruned(snapshot.model, collate(prompts()), 4)
    assert (few.logits - snapshot.before.logits).abs().max() > 0.1  # it was at work
    snapshot.check()


def test_detaching_by_hand_and_twice(snapshot: Snapshot) -> None:
    attachment = tokenprune.attach(snapshot.model, spec(4))
    assert leftovers(snapshot.model)
    generate(snapshot.model, collate(prompts()))
    attachment.detach()
    attachment.detach()
    snapshot.check()


def test_an_error_of_the_user_inside_the_context(snapshot: Snapshot) -> None:
    def use() -> None:
        with tokenprune.attach(snapshot.model, spec(4)):
            generate(snapshot.model, collate(prompts()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()
    snapshot.check()


@pytest.mark.parametrize(
    "where",
    [
        "vision_tower",
        "multi_modal_projector",
        "language_model.layers.0",
        "language_model.layers.2.mlp",
        "language_model.norm",
    ],
)
def test_an_error_in_mid_forward_leaves_nothing_behind(snapshot: Snapshot, where: str) -> None:
    model = snapshot.model
    wanted = pruned(model, collate(prompts()), 4)
    module = model.model.get_submodule(where)
    with tokenprune.attach(model, spec(4)):
        handle = module.register_forward_hook(_break)
        with pytest.raises(ZeroDivisionError):
            generate(model, collate(prompts()))
        handle.remove()
        again = generate(model, collate(prompts()))
        assert torch.equal(again.logits, wanted.logits)
        # A text-only batch after a broken one, which no pass of the tower begins anew.
        texts = collate([Row([1, 31, 32])])
        text = generate(model, texts)
    snapshot.check()
    assert torch.equal(text.logits, generate(model, texts).logits)


def _break(*args: object) -> None:
    raise ZeroDivisionError


def test_a_tower_adapter_that_fails_half_way(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = ClipTowerAdapter.install

    def half(self: Any, tower: nn.Module, *rest: Any) -> Iterator[Removable]:
        for number, handle in enumerate(complete(self, tower, *rest)):
            yield handle
            if number == 2:
                assert leftovers(tower)
                raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(ClipTowerAdapter, "install", half)
        with pytest.raises(ZeroDivisionError):
            tokenprune.attach(snapshot.model, spec(4))
    snapshot.check()
    with tokenprune.attach(snapshot.model, spec(4)):  # and it can be attached afterwards
        pass


def test_layers_that_the_tower_does_not_have(snapshot: Snapshot) -> None:
    with pytest.raises(tokenprune.ShapeError, match="layers=5 asks for 5 layers, but only 4 end"):
        tokenprune.attach(snapshot.model, "cls-attention(layers=5) | evict(4) @ before-llm")
    snapshot.check()


def test_attaching_twice_is_refused(llava: MakeLlava) -> None:
    model = llava()
    with tokenprune.attach(model, spec(4)) as attachment:
        with pytest.raises(AttachError, match=r"already attached with .cls-attention.*; detach it"):
            tokenprune.attach(model, spec(9))
        assert attachment.spec == tokenprune.spec_of(tokenprune.parse(spec(4)))
    tokenprune.attach(model, spec(9)).detach()


class _Wrapper(LlavaForConditionalGeneration):
    """A model with an adapter that holds another one."""


@pytest.mark.parametrize("first", ["inner", "outer"])
def test_attaching_to_a_part_or_a_whole_of_something_attached_is_refused(first: str) -> None:
    inner, outer = tiny_llava(), _Wrapper(tiny_llava().config)
    outer.model = inner.model
    one, other = (inner, outer) if first == "inner" else (outer, inner)
    with tokenprune.attach(one, spec(4)):
        with pytest.raises(AttachError, match=r"which has parts of this .* is already attached"):
            tokenprune.attach(other, spec(9))
        wanted = generate(inner, collate(prompts()))
    assert torch.equal(pruned(inner, collate(prompts()), 4).logits, wanted.logits)
    with tokenprune.attach(other, spec(9)):
        pass


def test_copies_of_an_attached_model_are_refused(llava: MakeLlava) -> None:
    model = llava()
    with tokenprune.attach(model, spec(4)):
        with pytest.raises(AttachError, match="detach before copying a model"):
            copy.deepcopy(model)
        with pytest.raises(AttachError, match="detach before pickling a model"):
            pickle.dumps(model)
        with pytest.raises(AttachError, match="detach before pickling a model"):
            torch.save(model, io.BytesIO())
    wanted = pruned(model, collate(prompts()), 4)
    # A fresh one, since transformers itself leaves hooks that cannot be pickled.
    copied = pickle.loads(pickle.dumps(copy.deepcopy(tiny_llava())))
    assert torch.equal(pruned(copied, collate(prompts()), 4).logits, wanted.logits)


def test_saving_an_attached_model(llava: MakeLlava, tmp_path: Path) -> None:
    model = llava()
    with tokenprune.attach(model, spec(4)):
        model.save_pretrained(tmp_path / "attached")
        state = model.state_dict()
    model.save_pretrained(tmp_path / "vanilla")
    assert list(state) == list(model.state_dict())
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        attached, vanilla = (tmp_path / name / file for name in ("attached", "vanilla"))
        assert attached.read_bytes() == vanilla.read_bytes()
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "attached").eval()
    wanted = generate(model, collate(prompts()))
    assert torch.equal(generate(loaded, collate(prompts())).text, wanted.text)


def test_moving_and_casting_while_attached() -> None:
    model = tiny_llava()
    inputs = collate(prompts())
    with tokenprune.attach(model, spec(4)):
        model.to(torch.float64)
        double = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        answer = generate(model, double)
    text, logits = greedy_batch(tiny_llava(), prompts(), 4)
    assert torch.equal(answer.text, text)
    torch.testing.assert_close(answer.logits.float(), logits, rtol=0, atol=1e-5)


def test_two_models_attached_at_once(llava: MakeLlava) -> None:
    """And left in the order in which they were attached, not the reverse."""
    first, second = llava(), tiny_llava(seed=5)
    wanted = [pruned(first, collate(prompts()), 4), pruned(second, collate(prompts()), 9)]
    one, two = tokenprune.attach(first, spec(4)), tokenprune.attach(second, spec(9))
    assert torch.equal(generate(first, collate(prompts())).logits, wanted[0].logits)
    one.detach()
    assert torch.equal(generate(second, collate(prompts())).logits, wanted[1].logits)
    two.detach()
    assert leftovers(second) == []


def test_six_threads_on_one_model(llava: MakeLlava) -> None:
    """Prompts of different shapes at once give what they give one after the other."""
    model = llava()
    batches = [
        prompts(),
        prompts()[:1],
        prompts()[1:],
        [Row([1, 9, picture(seed=4), 8])],
        [prompts()[2]],
        [Row([1, picture(seed=5), 7, picture(seed=6)]), prompts()[0]],
    ]
    with tokenprune.attach(model, spec(4)) as attachment:
        wanted = [generate(model, collate(batch)) for batch in batches]
        with ThreadPoolExecutor(max_workers=6) as threads:
            got = list(threads.map(lambda batch: generate(model, collate(batch)), batches * 3))
    for one, other in zip(got, wanted * 3, strict=True):
        assert torch.equal(one.text, other.text)
        assert torch.equal(one.logits, other.logits)
    assert attachment.report.calls == 4 * 5  # one of the six has text only


def test_two_threads_inside_one_forward_each(llava: MakeLlava) -> None:
    """Every forward waits at every layer for another one, so that they surely interleave."""
    model, alive = llava(), 2
    batches = [prompts(), [prompts()[1], prompts()[0], prompts()[2]]]
    meet = threading.Barrier(alive, timeout=20)

    def wait(*args: object) -> None:
        meet.wait()

    layers = [*model.model.vision_tower.modules(), *model.model.language_model.modules()]
    with tokenprune.attach(model, spec(4)), torch.no_grad():
        wanted: list[Tensor] = [model(**collate(batch)).logits for batch in batches]
        waiting = [
            layer.register_forward_pre_hook(wait)
            for layer in layers
            if type(layer).__name__ in ("CLIPEncoderLayer", "LlamaDecoderLayer", "Linear")
        ]
        try:
            with ThreadPoolExecutor(max_workers=alive) as threads:
                got = list(threads.map(lambda batch: _logits(model, batch), batches))
        finally:
            for handle in waiting:
                handle.remove()
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def _logits(model: Any, batch: list[Row]) -> Tensor:
    logits: Tensor = model(**collate(batch)).logits
    return logits
