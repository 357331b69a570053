"""Two tensor-parallel processes, of which each has half of the heads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from support.served import Plain, RefusedError, Server, check, questions

SPEC = "vtc-cls(keep=7, ensemble='max')"
OPTIONS = ["--tensor-parallel-size", "2"]

pytestmark = pytest.mark.parametrize("server", [(SPEC, OPTIONS)], indirect=True, ids=[""])


def test_answers_are_those_of_one_process(server: Server, plain: Plain) -> None:
    """Where each process ranked tokens by its own heads, one answer in six was wrong."""
    asked = questions(33, first=600)
    with ThreadPoolExecutor(8) as at_once:
        said = list(at_once.map(server.ask, asked))
    for question, answer in zip(asked, said, strict=True):
        check(answer, plain.ask(question, SPEC), question)


def test_clients_are_not_trusted_unless_the_server_says_so(server: Server) -> None:
    (question,) = questions(1)
    with pytest.raises(RefusedError, match="--trust-request-mm-kwargs") as caught:
        server.ask(replace(question, keep=3))
    assert caught.value.status == 400
