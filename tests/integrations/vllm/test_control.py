"""The control, seeded by the picture itself: a fraction, and no signals at all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from support.served import Plain, Server, check, questions

SPEC = "random(seed=3) | evict(0.25)"
OPTIONS = ["--max-num-batched-tokens", "256"]  # the tower sees 4 pictures at a time


def test_answers_are_those_of_transformers(server: Server, plain: Plain) -> None:
    asked = questions(22, first=700)
    with ThreadPoolExecutor(16) as at_once:
        said = list(at_once.map(server.ask, asked))
    for question, answer in zip(asked, said, strict=True):
        check(answer, plain.ask(question, SPEC), question)
