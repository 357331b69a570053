"""A server with a budget of its own, which every request may replace."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from support.served import Plain, Question, RefusedError, Server, check, questions

SPEC = "cls-attention | evict(14)"
OPTIONS = [
    "--trust-request-mm-kwargs",
    *("--limit-mm-per-prompt", '{"image": 3}'),
    *("--block-size", "32"),  # of the KV cache: prompts are longer than one
]
pytestmark = pytest.mark.parametrize("server", [(SPEC, OPTIONS)], indirect=True, ids=[""])

# The first 32 ids of a prompt are the same at 33 and at 60 tokens, and fill a block.
ORDERS: list[tuple[float | None, ...]]
ORDERS = [(33, 60), (60, 33), (1, 1.0), (1.0, 1), (None, 40), (40, None)]
KEEPS = [None, 1, 1.0, 3, 0.11, 14, 28, 64]


def test_budgets_side_by_side(server: Server, plain: Plain) -> None:
    """Many requests at once, of which each has a budget of its own."""
    asked = [replace(question, keep=keep) for question in questions(len(KEEPS)) for keep in KEEPS]
    with ThreadPoolExecutor(16) as at_once:
        said = list(at_once.map(server.ask, asked))
    expected = [plain.ask(question, SPEC) for question in asked]
    for question, one, other in zip(asked, said, expected, strict=True):
        check(one, other, question)
    # The test can fail: what is kept decides what is said.
    per_question = [expected[i : i + len(KEEPS)] for i in range(0, len(expected), len(KEEPS))]
    assert any(len({answer.text for answer in some}) > 1 for some in per_question)
    assert len({answer.prompt for answer in per_question[0]}) == 6


@pytest.mark.parametrize("keeps", ORDERS)
def test_one_picture_at_two_budgets(
    server: Server, plain: Plain, keeps: tuple[float | None, ...]
) -> None:
    """Each comes after the other, and once more when both are in the caches."""
    (question,) = questions(1, first=100 + ORDERS.index(keeps))
    for keep in (*keeps, *keeps):
        asked = replace(question, keep=keep)
        check(server.ask(asked), plain.ask(asked, SPEC), asked)


def test_one_picture_by_its_name_at_two_budgets(server: Server, plain: Plain) -> None:
    """A client may name a picture, and leave it out later: its budget is still part of the key."""
    (question,) = questions(1, first=300)
    named = replace(question, uuid="a-picture")
    for keep in (4, 20, None):
        asked = replace(named, keep=keep)
        expected = plain.ask(asked, SPEC)
        check(server.ask(asked), expected, asked)
        check(server.ask(asked, pictures=False), expected, asked)


def test_prefixes_are_found_again(server: Server, plain: Plain) -> None:
    """A second question about a picture at the same budget finds the picture in the KV cache."""
    question = Question("what colour is the background ?", (400,), keep=64)
    server.ask(question)
    before = server.metric("vllm:prefix_cache_hits_total")
    again = replace(question, text="what is the background ?")
    check(server.ask(again), plain.ask(again, SPEC), again)
    assert server.metric("vllm:prefix_cache_hits_total") > before


def test_several_pictures_and_none(server: Server, plain: Plain) -> None:
    asked = Question("how many objects are there ?", (500, 501, 500), keep=9)
    check(server.ask(asked), plain.ask(asked, SPEC), asked)
    text = server.chat("how many objects are there ?")
    assert text.prompt < 14


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (0, "keep=0 leaves no visual token before the LLM"),
        (-3, "must be >= 0"),
        (1.5, "a fraction to keep must be in (0, 1]"),
        (True, "keep must be an int (count) or a float (fraction)"),
        ("all", "keep must be an int (count) or a float (fraction)"),
    ],
)
def test_wrong_budgets_are_the_clients_fault(
    server: Server, plain: Plain, keep: object, words: str
) -> None:
    (question,) = questions(1)
    with pytest.raises(RefusedError) as caught:
        server.ask(replace(question, keep=keep))  # type: ignore[arg-type]
    assert caught.value.status == 400
    assert words in str(caught.value)
    check(server.ask(question), plain.ask(question, SPEC), question)  # and the engine lives on


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tokenprun": {"keep": 3}}, "has 'tokenprun', which nobody reads (did you mean"),
        ({"keep": 3}, "a picture's budget is written {'tokenprune': {'keep': count or"),
        ({"images_kwargs": {"tokenprune": {"keep": 3}}}, "mm_processor_kwargs['images_kwargs']"),
        ({"tokenprune": {"kep": 3}}, "must be {'keep': count or fraction}, got {'kep': 3}"),
        ({"tokenprune": 3}, "must be {'keep': count or fraction}, got 3"),
        ({"tokenprune": None}, "is null; leave it out for the engine's own budget"),
        # It would end the engine, of all clients, in the tower.
        (
            {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
            "make pictures of 32x32 pixels, but the vision tower takes",
        ),
    ],
)
def test_options_that_nobody_reads_are_the_clients_fault(
    server: Server, plain: Plain, more: dict[str, object], words: str
) -> None:
    """Also of a picture that is in all caches already."""
    (question,) = questions(1, first=800)
    check(server.ask(question), plain.ask(question, SPEC), question)
    with pytest.raises(RefusedError) as caught:
        server.ask(question, **more)
    assert caught.value.status == 400
    assert words in str(caught.value)
    check(server.ask(question), plain.ask(question, SPEC), question)


def test_options_of_the_processor_are_let_through(server: Server, plain: Plain) -> None:
    asked = replace(questions(1, first=810)[0], keep=20)
    said = server.ask(asked, do_convert_rgb=True, images_kwargs={"do_normalize": True})
    check(said, plain.ask(asked, SPEC), asked)
