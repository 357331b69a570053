"""The results page says what its data says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from tokenprune_adapters import pocket

ROOT = Path(__file__).parents[2]


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "results" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_written_from_its_data() -> None:
    page = script("page")
    data = json.loads(page.DATA.read_text())
    training = json.loads((pocket.CHECKPOINT / "results.json").read_text())
    assert page.PAGE.read_text() == page.page(data, training)


def test_the_first_model_is_the_shipped_one() -> None:
    page = script("page")
    data = json.loads(page.DATA.read_text())
    shipped = json.loads((pocket.CHECKPOINT / "results.json").read_text())
    assert data["models"] == len(data["seeds"]) >= 3
    assert data["seeds"][0] == shipped["training"]["seed"]
    vanilla = data["rows"][0]
    assert vanilla["label"] == "vanilla"
    assert abs(vanilla["models"][0] - shipped["scores"]["vanilla"]["all"]["accuracy"]) < 0.002


def test_a_verdict_needs_two_errors_and_every_model() -> None:
    verdict = script("page").verdict
    assert verdict({"difference": 0.03, "error": 0.01, "models": [0.02, 0.04]}) == "better"
    assert verdict({"difference": -0.03, "error": 0.01, "models": [-0.02, -0.04]}) == "**worse**"
    unclear = "no difference beyond the errors"
    assert verdict({"difference": 0.019, "error": 0.01, "models": [0.019, 0.019]}) == unclear
    assert verdict({"difference": 0.03, "error": 0.01, "models": [-0.01, 0.07]}) == unclear


def test_the_published_column_for_measurements_is_empty() -> None:
    """Nobody has measured; a figure typed in would show here."""
    text = script("page").PAGE.read_text()
    published = text[text.index("## Published figures") :]
    rows = [line for line in published.splitlines() if line.startswith("| ") and "---" not in line]
    assert all(line.endswith(("| measured |", "|  |")) for line in rows)
    assert len(rows) > 25
