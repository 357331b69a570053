"""A server that cannot do what it is asked to does not start, and says why."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path

import pytest

from support.served import PATIENCE, Server
from tokenprune_adapters.vllm import ARCHITECTURE, KEY

SPEC = "uniform | evict(3)"
MISSPELT = {"architectures": [ARCHITECTURE], KEY: {"prune": SPEC}, "keep": 3}

# vLLM 0.30, as far as the plugin was concerned that was written for 0.32.
RENAMED = """
def register():
    from vllm.multimodal.processing import BaseMultiModalProcessor
    main = BaseMultiModalProcessor._apply_hf_processor_main
    del BaseMultiModalProcessor._apply_hf_processor_main
    BaseMultiModalProcessor._apply_hf_processor_first = main
"""


def last_words(server: Server) -> str:
    process, until = server.start(), time.monotonic() + PATIENCE
    try:
        while process.poll() is None and time.monotonic() < until:
            assert not server.is_up(), "it started"
            time.sleep(1)
        assert process.poll()
    finally:
        server.__exit__(None, None, None)
    return server.log.read_text().strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("spec", "options", "words"),
    [
        ("fastv", [], "acts inside the LLM. vLLM gives every token of a step one slot"),
        ("uniform | evict(0)", [], "keep=0 leaves no visual token before the LLM"),
        (SPEC, ["--enable-mm-embeds"], "have passed no vision tower here"),
        (SPEC, ["--mm-processor-kwargs", '{"tokenprun": {"keep": 3}}'], "has 'tokenprun', which"),
        (SPEC, ["--hf-overrides", json.dumps(MISSPELT)], "hf_overrides has 'keep', which nobody"),
    ],
    ids=["inside the LLM", "budget", "embeddings", "processor options", "overrides"],
)
def test_the_reason_is_the_last_word(
    checkpoint: Path, tmp_path: Path, spec: str, options: list[str], words: str
) -> None:
    assert words in last_words(Server(checkpoint, spec, options, tmp_path / "log"))


def test_a_vllm_that_has_renamed_a_method(checkpoint: Path, tmp_path: Path) -> None:
    """Otherwise the server starts, and its first picture ends the engine."""
    (tmp_path / "renamed.py").write_text(RENAMED)
    info = tmp_path / "renamed-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: renamed\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nrenamed = renamed:register\n")
    said = last_words(Server(checkpoint, SPEC, [], tmp_path / "log", path=str(tmp_path)))
    assert "LlavaMultiModalProcessor._apply_hf_processor_main is missing" in said
    assert "Install another vLLM (tested: " in said


@pytest.mark.usefixtures("checkpoint")  # which skips without vLLM
def test_the_vllm_that_is_installed_is_a_tested_one() -> None:
    from vllm import __version_tuple__

    from tokenprune_adapters.vllm import llava
    from tokenprune_adapters.vllm.parents import check_parents

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_parents(
            __version_tuple__,
            llava.TokenpruneLlavaProcessingInfo,
            llava.TokenpruneLlavaProcessor,
            llava.TokenpruneLlavaForConditionalGeneration,
        )
