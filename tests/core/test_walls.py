"""Walls between the rooms of the house: who may import whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tokenprune

SRC = Path(tokenprune.__file__).parents[1]
TOOLS = ("analysis", "batch", "bench", "cli", "doctor", "page", "testing")
DOOR = "tokenprune.shipped_adapters"
ROOMS = ("hf", "kit", "lmms_eval", "open_clip", "pocket", "vllm")


def imports(source: str, module: str, package: bool = False) -> Iterator[str]:
    """Dotted names of everything that a module imports, at its top or later."""
    inside = module.split(".") if package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = inside[: len(inside) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{name.name}" for name in node.names)


def modules(package: str) -> dict[str, set[str]]:
    """What each module below `package` imports."""
    found = {}
    for path in sorted((SRC / package).rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        own = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if own else parts)
        found[name] = set(imports(path.read_text(), name, own))
    return found


def below(name: str, *packages: str) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in packages)


CORE, ADAPTERS = modules("tokenprune"), modules("tokenprune_adapters")
del CORE["tokenprune.__main__"]  # the command line under another name
TOOLBOXES = tuple(f"tokenprune.{tool}" for tool in TOOLS)


def crossing(found: dict[str, set[str]], *forbidden: str) -> list[str]:
    return [
        f"{module} imports {name}"
        for module, names in found.items()
        for name in sorted(names)
        if below(name, *forbidden)
    ]


def test_core_imports_no_tool() -> None:
    core = {name: names for name, names in CORE.items() if not below(name, *TOOLBOXES)}
    assert {"tokenprune.plan", "tokenprune.loading", "tokenprune.reducers.tome"} <= set(core)
    assert not crossing(core, *TOOLBOXES)


def test_tools_reach_adapters_by_one_door() -> None:
    behind = {name: names for name, names in CORE.items() if name != DOOR}
    assert not crossing(behind, "tokenprune_adapters")
    assert crossing({DOOR: CORE[DOOR]}, "tokenprune_adapters")


def test_adapters_import_no_tool() -> None:
    contract = "tokenprune_adapters.hf.contract"  # a part of the contract kit that knows families
    adapters = {name: names for name, names in ADAPTERS.items() if not below(name, contract)}
    assert not crossing(adapters, *TOOLBOXES, DOOR)
    assert not crossing(adapters, contract)
    others = [tool for tool in TOOLBOXES if tool != "tokenprune.testing"]
    assert not crossing(ADAPTERS, *others, DOOR)


def test_the_contract_kit_imports_no_other_tool() -> None:
    kit = {name: names for name, names in CORE.items() if below(name, "tokenprune.testing")}
    others = [tool for tool in TOOLBOXES if tool != "tokenprune.testing"]
    assert not crossing(kit, *others)


def test_the_adapter_kit_is_pure_torch() -> None:
    kit = {n: names for n, names in ADAPTERS.items() if below(n, "tokenprune_adapters.kit")}
    rooms = [f"tokenprune_adapters.{room}" for room in ROOMS if room != "kit"]
    assert not crossing(kit, "transformers", "open_clip", "timm", "vllm", "PIL", *rooms)


@pytest.mark.parametrize("room", ["hf", "open_clip", "pocket", "vllm", "lmms_eval"])
def test_each_room_knows_its_own_library_alone(room: str) -> None:
    """`hf` alone reads modules of transformers; vLLM and lmms-eval build on what it knows."""
    library = {"hf": "transformers", "pocket": "transformers"}.get(room, room)
    own = {
        name: names
        for name, names in ADAPTERS.items()
        if below(name, f"tokenprune_adapters.{room}")
    }
    assert own
    known = {"transformers", "open_clip", "vllm", "lmms_eval"} - {library}
    if room in ("vllm", "lmms_eval"):  # products on models of transformers
        known -= {"transformers"}
    assert not crossing(own, *known)
    apart = {"pocket", "vllm", "lmms_eval", "open_clip", "hf"} - {room, "hf"}
    assert not crossing(own, *(f"tokenprune_adapters.{each}" for each in apart))


def test_there_are_seven_rooms() -> None:
    there = {name.split(".")[1] for name in ADAPTERS if "." in name}
    assert there == {*ROOMS, "plugin"}


def test_the_check_sees_every_kind_of_import() -> None:
    source = "def f():\n  from ..cli import app\n  import tokenprune.bench as b\nfrom . import x"
    seen = set(imports(source, "tokenprune.page.document"))
    assert seen == {"tokenprune.cli.app", "tokenprune.bench", "tokenprune.page.x"}
