"""tokenprune: training-free visual-token compression for multimodal LLMs.

VisualTokens + Signals --Scorer--> scores --Reducer--> Plan --apply--> VisualTokens

Public names stand in `__init__.pyi`. Each is imported when it is first used, since most of them
bring torch, for which a command such as `tokenprune --help` should not wait.
"""

import ast
from importlib import import_module
from pathlib import Path

_HOMES = {
    name.name: node.module
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text()).body
    if isinstance(node, ast.ImportFrom)
    for name in node.names
}

__all__ = sorted(name for name in _HOMES if not name.startswith("_"))


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
