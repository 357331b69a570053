"""No name of an argument or output field of transformers stands outside of the wall."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tokenprune_adapters
from tokenprune_adapters.hf.names import Argument, Call
from tokenprune_adapters.hf.outputs import Field, Output

ROOT = Path(tokenprune_adapters.__file__).parent
WALL = ("hf/names.py", "hf/outputs.py", "hf/anatomy.py")
# Other libraries have names of their own, and vanilla runs by hand call models by name.
ELSEWHERE = ("hf/contract", "hf/trials", "lmms_eval", "open_clip", "pocket", "vllm")

ARGUMENTS = {
    name for each in vars(Call).values() if isinstance(each, Argument) for name in each.names
}
FIELDS = {
    name
    for value in vars(Output).values()
    for each in (value if isinstance(value, tuple) else (value,))
    if isinstance(each, Field)
    for name in each.names
}
NAMES = ARGUMENTS | FIELDS
# What our own code calls so, too: attributes and keywords of this name are not of transformers.
OURS = {"cache"}


def spelled(source: str) -> Iterator[tuple[int, str]]:
    """Lines and names of transformers in strings, attributes, keywords and parameters."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and node.value in NAMES:
            yield node.lineno, str(node.value)
        elif isinstance(node, ast.Attribute) and node.attr in NAMES - OURS:
            yield node.lineno, node.attr
        elif isinstance(node, ast.keyword) and node.arg in NAMES - OURS:
            yield node.value.lineno, str(node.arg)
        elif isinstance(node, ast.arg) and node.arg in NAMES - OURS:
            yield node.lineno, node.arg
        elif isinstance(node, ast.MatchClass):
            yield from ((node.lineno, name) for name in node.kwd_attrs if name in NAMES - OURS)


def guarded() -> list[Path]:
    return [
        path
        for path in sorted(ROOT.rglob("*.py"))
        if (name := path.relative_to(ROOT).as_posix()) not in WALL
        and not any(name == each or name.startswith(f"{each}/") for each in ELSEWHERE)
    ]


@pytest.mark.parametrize("path", guarded(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_names_of_transformers_stand_in_the_wall(path: Path) -> None:
    assert list(spelled(path.read_text("utf-8"))) == []


def test_the_guard_sees_adapters_and_knows_names() -> None:
    seen = {path.relative_to(ROOT).as_posix() for path in guarded()}
    llm = {"hf/llm/short_prompt.py", "hf/llm/inner_stages.py"}
    assert llm | {"hf/encoders.py", "hf/encoder_tower.py"} <= seen
    assert {"cache", "past_key_values", "inputs_embeds", "image_outputs"} <= NAMES


@pytest.mark.parametrize(
    "planted",
    [
        'kwargs.get("past_key_values")',
        'kwargs["attention_mask"] = None',
        "output.last_hidden_state",
        "output.image_hidden_states = None",
        "tower(pixel_values=x)",
        'getattr(output, "cache", None)',
        'NEEDED = ("hidden_states",)',
        'kwargs |= {"position_ids": x}',
        'setattr(output, f"pooler_output", x)',
        "tower = lambda pixel_values, **rest: rest",
        "match output:\n        case x(last_hidden_state=found): pass",
        'match kwargs:\n        case {"use_cache": found}: pass',
    ],
)
def test_the_guard_can_fail(planted: str) -> None:
    assert list(spelled(f"def hook(kwargs, output, tower, x):\n    {planted}\n")) != []


def test_the_guard_lets_our_own_words_be() -> None:
    assert list(spelled('"""The attention_mask of a call."""\nrun.cache = call.cache\n')) == []
