"""Signals: requests, layers, the mapping, reduction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st

from core.generators import plans, same_bits, visual_tokens
from tokenprune import (
    ClsAttention,
    Keys,
    LastQueryAttention,
    MissingSignalError,
    Plan,
    ShapeError,
    Signal,
    Signals,
)
from tokenprune.signals import resolve_layers


@dataclass(frozen=True)
class Weather(Signal):
    """A signal without an axis of tokens."""

    axes: ClassVar[str] = "batch channels"


@given(st.integers(1, 30), st.data())
def test_k_layers_end_at_the_layer_of_the_features(count: int, data: st.DataObject) -> None:
    feature_layer = data.draw(st.integers(0, count - 1))
    k = data.draw(st.integers(1, feature_layer + 1))
    layers = resolve_layers(k, feature_layer, count)
    assert len(layers) == k
    assert layers[-1] == feature_layer
    assert list(layers) == list(range(layers[0], layers[0] + k))
    # The paper's eq. 9, in its own numbers that start at one.
    if feature_layer == count - 2:
        assert [layer + 1 for layer in layers] == list(range(count - k, count))


@given(st.integers(1, 30), st.data())
def test_explicit_layers_count_as_lists_do(count: int, data: st.DataObject) -> None:
    indices = st.integers(-count, count - 1)
    layers = tuple(data.draw(st.lists(indices, min_size=1, unique=True)))
    blocks = list(range(count))
    assert resolve_layers(layers, 0, count) == tuple(blocks[layer] for layer in layers)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ClsAttention(0), "layers=K takes the K last layers, K >= 1, got 0"),
        (lambda: ClsAttention(-2), "K >= 1, got -2"),
        (lambda: ClsAttention(True), "layers must be an int K or a tuple of layer indices"),
        (lambda: ClsAttention("3"), "got '3'"),
        (lambda: ClsAttention(3.0), "got 3.0"),
        (lambda: ClsAttention(()), "distinct layer indices, at least one, got ()"),
        (lambda: ClsAttention((1, 1)), "layers must be distinct"),
        (lambda: ClsAttention((1, 2.0)), "got (1, 2.0)"),
        (
            lambda: resolve_layers(4, 2, 24),
            "layers=4 asks for 4 layers, but only 3 end at layer 2, which produces the features",
        ),
        (lambda: resolve_layers((24,), 2, 24), "asks for a layer outside of the model's 24"),
        (lambda: resolve_layers((-25,), 2, 24), "outside of the model's 24"),
    ],
)
def test_impossible_layers_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ShapeError) as caught:
        make()
    assert words in str(caught.value)


def test_requests_are_values() -> None:
    assert ClsAttention([20, 21]) == ClsAttention((20, 21))  # type: ignore[arg-type]
    assert len({ClsAttention(3), ClsAttention(3), ClsAttention((21, 22, 23)), Keys(3)}) == 3


def test_signals_are_a_mapping_that_says_what_is_there() -> None:
    rows, keys = torch.rand(1, 3, 2, 5), torch.rand(1, 2, 5, 4)
    signals = Signals({ClsAttention(3): rows, Keys(-2): keys})
    assert signals[ClsAttention(3)] is rows
    assert list(signals) == [ClsAttention(3), Keys(-2)]
    assert len(signals) == 2
    assert Keys(-2) in signals
    assert Keys(-1) not in signals
    with pytest.raises(MissingSignalError) as caught:
        signals[Keys(-1)]
    assert str(caught.value) == (
        "Keys(layer=-1) was not supplied; supplied: ClsAttention(layers=3), Keys(layer=-2)"
    )
    assert isinstance(caught.value, LookupError)
    with pytest.raises(MissingSignalError, match="supplied: none"):
        Signals()[Keys(-1)]


def test_signals_need_their_axes() -> None:
    with pytest.raises(ShapeError) as caught:
        Signals({LastQueryAttention(): torch.rand(1, 2, 5)})
    assert str(caught.value) == (
        "LastQueryAttention(layers=(-1,)) must have axes (batch layers heads tokens), got (1, 2, 5)"
    )


@given(st.data())
def test_signals_are_reduced_on_their_tokens(data: st.DataObject) -> None:
    tokens = data.draw(visual_tokens())
    plan = data.draw(plans(tokens))
    batch, count = tokens.mask.shape
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    rows = torch.rand(batch, 2, 3, count, generator=generator)
    keys = torch.rand(batch, 3, count, 2, generator=generator)
    weather = torch.rand(batch, 7, generator=generator)
    reduced = Signals({ClsAttention(2): rows, Keys(-2): keys, Weather(): weather}).reduce(plan)
    assert reduced[Weather()] is weather
    for layer in range(2):
        for head in range(3):
            one = plan(rows[:, layer, head, :, None]).squeeze(-1)
            torch.testing.assert_close(reduced[ClsAttention(2)][:, layer, head], one)
    by_token = plan(rearrange(keys, "batch heads tokens channels -> batch tokens heads channels"))
    expected = rearrange(by_token, "batch kept heads channels -> batch heads kept channels")
    assert same_bits(reduced[Keys(-2)], expected)


def test_selected_signals_keep_their_bits() -> None:
    rows = torch.rand(2, 1, 2, 4)
    keep = torch.tensor([[True, False, True, False], [False, True, False, True]])
    reduced = Signals({ClsAttention(1): rows}).reduce(Plan.select(keep))[ClsAttention(1)]
    assert same_bits(reduced[0], rows[0, :, :, [0, 2]])
    assert same_bits(reduced[1], rows[1, :, :, [1, 3]])
