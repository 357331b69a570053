"""A server that cannot do what it is asked to does not start, and says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.served import PATIENCE, Server


@pytest.mark.parametrize(
    ("spec", "options", "words"),
    [
        ("fastv", [], "acts inside the LLM. vLLM gives every token of a step one slot"),
        ("uniform | evict(3)", ["--enable-mm-embeds"], "have passed no vision tower here"),
    ],
    ids=["inside the LLM", "embeddings"],
)
def test_the_reason_is_the_last_word(
    checkpoint: Path, tmp_path: Path, spec: str, options: list[str], words: str
) -> None:
    server = Server(checkpoint, spec, options, tmp_path / "log")
    assert server.start().wait(PATIENCE) != 0
    assert words in server.log.read_text().strip().splitlines()[-1]
