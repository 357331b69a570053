"""Servers with other scorers than [CLS] attention, and other reducers than eviction."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from support.served import Plain, Server, check, questions

MERGING = "received-attention(layers=2) | dominant-contextual(10, contextual=0.2, layer=-2)"
CONTROL = "random(seed=3) | evict(0.25)"  # seeded by the pixels of each picture


@pytest.mark.parametrize(
    "server",
    [
        pytest.param((MERGING, []), id="merging"),
        # The tower sees 4 pictures at a time, of 16 that come at once.
        pytest.param((CONTROL, ["--max-num-batched-tokens", "256"]), id="control"),
    ],
    indirect=True,
)
def test_answers_are_those_of_transformers(server: Server, plain: Plain) -> None:
    asked = questions(32, first=700)
    with ThreadPoolExecutor(16) as at_once:
        said = list(at_once.map(server.ask, asked))
    for question, answer in zip(asked, said, strict=True):
        check(answer, plain.ask(question, server.spec), question)
