"""Calls and outputs of transformers as the wall reads and writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenprune
from support.llava import IMAGE, collate, prompts, spec, tiny_llava
from support.outputs import cache_argument, cache_of, shown_features
from tokenprune import UnsupportedError
from tokenprune_adapters.hf.families import LLAVA
from tokenprune_adapters.hf.names import Call, Signature
from tokenprune_adapters.hf.outputs import Output

from ..conftest import MakeLlava


class Decoder(nn.Module):
    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, cache: Any = None, **rest: Any
    ) -> None: ...


SIGNATURE = Signature.of(Decoder())


def test_an_argument_is_read_by_name_and_by_position() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    assert Call(SIGNATURE, (one, two), {}).mask is two
    assert Call(SIGNATURE, (one,), {"attention_mask": two}).mask is two
    assert Call(SIGNATURE, (), {"hidden_states": one}).hidden is one


def test_what_comes_by_name_alone_has_no_position() -> None:
    def strange(hidden_states: Tensor, *more: Any, attention_mask: Any = None) -> None: ...

    signature = Signature.of(strange)
    assert signature.order == ("hidden_states",)
    assert signature.names == {"hidden_states", "attention_mask"}
    assert signature.required == ("hidden_states",)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_each_name_of_an_argument_is_read_and_kept_when_written(name: str) -> None:
    call = Call(SIGNATURE, (), {name: "old"})
    assert call.cache == "old"
    call.cache = "new"
    assert call.kwargs == {name: "new"}


def test_of_two_names_the_one_with_a_value_counts() -> None:
    assert Call(SIGNATURE, (), {"cache": None, "past_key_values": "kept"}).cache == "kept"


def test_an_absent_argument_is_written_under_the_name_that_is_taken() -> None:
    def older(hidden_states: Tensor, past_key_values: Any = None) -> None: ...

    call = Call(Signature.of(older), (), {})
    call.cache = 1
    assert call.kwargs == {"past_key_values": 1}


def test_an_argument_by_position_is_written_in_its_place() -> None:
    call = Call(SIGNATURE, (1, 2, 3), {})
    call.mask = None
    assert (call.args, call.kwargs) == ((1, None, 3), {})


def test_an_absent_argument_is_an_error_in_words_unless_it_may_be_absent() -> None:
    call = Call(SIGNATURE, (), {"cache": 1})
    assert call.mask is None
    with pytest.raises(UnsupportedError, match="Decoder was called without hidden_states; it got"):
        _ = call.hidden


def test_missing_arguments_are_named_with_their_older_names() -> None:
    assert SIGNATURE.missing(Call.hidden, Call.cache) == []

    def bare(hidden_states: Tensor, **rest: Any) -> None: ...

    assert Signature.of(bare).missing(Call.cache) == ["cache (before: past_key_values)"]


def test_a_plain_tuple_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="plain tuple cannot be read; leave return_dict"):
        Output((torch.zeros(1),))


@dataclass
class Older:
    """An output up to 5.23, where image features are a field of their own."""

    image_hidden_states: Any
    video_hidden_states: Any = None


@pytest.mark.parametrize("kind", [list, tuple])
def test_features_of_each_image_are_shown_in_a_copy(kind: type[Any]) -> None:
    """Models whose images differ in size have a list of them; the output itself stays as it is."""
    raw = Older(kind([torch.zeros(2), torch.zeros(3)]))
    shown = Output(raw).show(lambda many: [each + 1 for each in many])
    assert type(shown.image_hidden_states) is kind
    assert [each.tolist() for each in shown.image_hidden_states] == [[1, 1], [1, 1, 1]]
    assert [each.tolist() for each in raw.image_hidden_states] == [[0, 0], [0, 0, 0]]
    assert shown.video_hidden_states is None


def test_features_of_videos_are_shown_without_pictures_too() -> None:
    shown = Output(Older(None, torch.ones(2))).show(lambda many: [*map(torch.neg, many)])
    assert shown.image_hidden_states is None
    assert shown.video_hidden_states.tolist() == [-1, -1]


def test_an_output_without_features_is_handed_on() -> None:
    raw = Older(None)
    assert Output(raw).show(lambda many: [*map(torch.neg, many)]) is raw


@pytest.mark.parametrize("named", [True, False], ids=["by name", "by position"])
def test_a_mask_by_position_counts(llava: MakeLlava, named: bool) -> None:
    """The core may be called with its arguments in order."""
    model, inputs = llava(), collate(prompts())
    core = model.model
    order = Signature.of(core).order
    with torch.no_grad(), tokenprune.attach(model, spec(4)):
        wanted = core(**inputs).last_hidden_state
        args = tuple(inputs.get(name) for name in order[:3])
        assert "attention_mask" in order[:3]
        got = core(**inputs) if named else core(*args)
    assert torch.equal(got.last_hidden_state, wanted)


@torch.no_grad()
def test_embeddings_by_position_count(llava: MakeLlava) -> None:
    """The language model, too, may be called with its arguments in order."""
    model, inputs = llava(), collate(prompts())
    llm, ids = model.model.language_model, inputs["input_ids"]
    order = Signature.of(llm).order
    with tokenprune.attach(model, spec(4)):
        features = torch.cat(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
        embeds = llm.get_input_embeddings()(ids)
        embeds[ids == IMAGE] = features
        named = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
        wanted = llm(**named).last_hidden_state
        args = tuple(named.get(name) for name in order[: order.index("inputs_embeds") + 1])
        got = llm(*args).last_hidden_state
    assert embeds.isneginf().any()
    assert torch.equal(got, wanted)


@torch.no_grad()
def test_encoder_outputs_are_never_edited(llava: MakeLlava) -> None:
    """`generate` hands them to later calls, which need the marks that callers don't see."""
    model = llava()
    inputs = collate(prompts())
    pixels = inputs.pop("pixel_values")
    with tokenprune.attach(model, spec(4)):
        encoded = model.get_image_features(pixels)
        marks = torch.cat(list(encoded.pooler_output)).isneginf()
        given = {"image": encoded}
        first = model(**inputs, mm_encoder_outputs=given)
        assert given["image"] is encoded
        assert torch.equal(torch.cat(list(encoded.pooler_output)).isneginf(), marks)
        second = model(**inputs, mm_encoder_outputs=given)
    assert marks.any()
    assert torch.equal(first.logits, second.logits)
    assert shown_features(first).isfinite().all()


@pytest.mark.parametrize("where", ["after-layer(1)", "before-llm"])
def test_no_word_of_ours_reaches_the_tower(where: str) -> None:
    """Models hand what they don't know on to attention kernels, some of which check keywords."""
    model = tiny_llava()
    seen: list[str] = []

    def note(module: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        seen.extend(kwargs)

    with torch.no_grad(), tokenprune.attach(model, f"cls-attention | evict(4) @ {where}"):
        for module in model.model.vision_tower.modules():
            module.register_forward_pre_hook(note, with_kwargs=True)
        model(**collate(prompts()))
    assert seen
    assert not [name for name in seen if name.startswith("tokenprune")]


@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_found_by_either_name(llava: MakeLlava, name: str) -> None:
    """Releases with a new name translate the old one inside of `forward`, after our hooks."""
    if name == "cache" and cache_argument() != "cache":
        pytest.skip("this release does not know the name")
    model = llava()
    inputs, step = collate(prompts()), torch.tensor([[5], [6], [7]])
    with tokenprune.attach(model, spec(4)):
        first = model(**inputs, use_cache=True)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.int64)], 1)
        more = {"input_ids": step, "attention_mask": mask, name: cache_of(first)}
        second = model(**more)
    assert cache_of(second) is cache_of(first)
    width = inputs["input_ids"].shape[1]
    assert cache_of(second).get_seq_length() == width + 1


def test_a_missing_part_is_named() -> None:
    with pytest.raises(UnsupportedError, match=r"Linear has no core \(looked for model\)"):
        LLAVA.anatomy(nn.Linear(1, 1))
