"""Scores without [CLS], keys of a layer, and tokens that are merged."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from support.served import Plain, Server, check, questions

SPEC = "received-attention(layers=2) | dominant-contextual(10, contextual=0.2, layer=-2)"
OPTIONS: list[str] = []


def test_answers_are_those_of_transformers(server: Server, plain: Plain) -> None:
    asked = questions(22, first=700)
    with ThreadPoolExecutor(8) as at_once:
        said = list(at_once.map(server.ask, asked))
    for question, answer in zip(asked, said, strict=True):
        check(answer, plain.ask(question, SPEC), question)
