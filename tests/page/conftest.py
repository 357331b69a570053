from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

HOSTILE = "<script src='https://evil.example/x.js'></script>&\"'><img src=x onerror=alert(1)>"


def bench_row(
    label: str, kind: str, keep: float, accuracy: float, **changes: Any
) -> dict[str, Any]:
    tokens = 64 if kind == "vanilla" or label == "blind" else round(64 * keep)
    row = {
        "label": label,
        "spec": None if kind == "vanilla" else f"{label} | evict({keep}) @ before-llm",
        "kind": kind,
        "keep": keep,
        "accuracy": accuracy,
        "error": 0.0123,
        "types": {
            "colour": {"accuracy": accuracy + 0.05, "error": 0.02, "questions": 40},
            "existence": {"accuracy": accuracy - 0.05, "error": None, "questions": 80},
        },
        "f1": accuracy - 0.01,
        "agreement": 0.875,
        "agreement_error": 0.0321,
        "tokens": [[0, tokens]],
        "kv_bytes": 1536.0 * tokens,
        "kv_bytes_vanilla": 1536.0 * 64,
        "selector_ms": 0.0 if kind == "vanilla" else 0.5678,
        "first_token_ms": 12.345,
        "total_ms": 234.5,
        "beats_floors": None,
    }
    return {**row, **changes}


BENCH = {
    "format": 1,
    "model": "pocket",
    "data": {"name": "Pocket-VQA", "questions": 1200, "pictures": 40},
    "device": "cpu",
    "dtype": "float32",
    "batch": 50,
    "versions": {"tokenprune": "0.1", "torch": "2.6", "transformers": "5.4"},
    "rows": [
        bench_row("vanilla", "vanilla", 1.0, 0.93),
        bench_row("blind", "control", 1.0, 0.3),
        bench_row("vtc-cls", "method", 0.25, 0.8, beats_floors=True),
        bench_row("tome", "method", 0.25, 0.6, beats_floors=False, agreement_error=None),
        bench_row("random", "floor", 0.25, 0.61),
        bench_row("pool", "floor", 0.25, 0.64),
        bench_row("inside", "method", 0.125, 0.71, tokens=[[0, 64], [2, 8.5]], kv_bytes=None),
        bench_row("random", "floor", 0.125, 0.5),
    ],
}


def curve(scorer: str, measure: str, queries: str, keep: float | None, value: float) -> Any:
    one = {"value": value, "error": 0.01, "questions": 20}
    layers = [one, {**one, "value": value + 0.1}]
    return {
        "scorer": scorer,
        "measure": measure,
        "queries": queries,
        "keep": keep,
        "layers": layers,
        "mean": one,
    }


ANALYSIS = {
    "format": 1,
    "model": "pocket",
    "data": {"name": "Pocket-VQA", "questions": 20, "pictures": 5},
    "device": "cpu",
    "dtype": "float32",
    "tokens": 64.0,
    "answer": 1.0,
    "scorers": ["cls-attention", "random"],
    "keeps": [14],
    "versions": {"tokenprune": "0.1", "torch": "2.6", "transformers": "5.4"},
    "curves": [
        curve("cls-attention", "overlap", "output", 14, 0.456),
        curve("cls-attention", "correlation", "output", None, 0.321),
        curve("random", "overlap", "output", 14, 0.22),
        curve("random", "correlation", "output", None, -0.004),
        curve("", "share", "output", None, 0.3),
    ],
}


@pytest.fixture
def bench() -> dict[str, Any]:
    return copy.deepcopy(BENCH)


@pytest.fixture
def filled(tmp_path: Path) -> Callable[..., Path]:
    """A folder with what is given by name; pictures with a description."""

    def fill(**files: Any) -> Path:
        for name, content in files.items():
            if isinstance(content, str):
                notes = PngInfo()
                notes.add_itxt("Description", content)
                picture = Image.new("RGB", (30, 20), (0, 90, 200))
                picture.save(tmp_path / f"{name}.png", pnginfo=notes)
            else:
                (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return fill


@pytest.fixture
def analysis() -> dict[str, Any]:
    return copy.deepcopy(ANALYSIS)


@pytest.fixture
def hostile() -> str:
    return HOSTILE
