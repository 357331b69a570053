"""Files of a bench and of an analysis, read again."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from ..analysis.curves import FORMAT as ANALYSIS_FORMAT
from ..analysis.curves import Consistency, Curve
from ..bench.result import FORMAT as BENCH_FORMAT
from ..bench.result import Bench, Row
from ..bench.scoring import Mean
from ..errors import TokenpruneError

T = TypeVar("T")

_NUMBERS = (
    *("keep", "accuracy", "error", "agreement", "agreement_error"),
    *("selector_ms", "first_token_ms", "total_ms"),
)


class PageError(TokenpruneError, ValueError):
    """A folder holds nothing to show, or a file of it cannot be read."""


def read_bench(path: Path) -> Bench:
    """What `tokenprune bench` wrote, without its answers.

    Raises:
        PageError: it is no such file.
    """
    found = _opened(path, BENCH_FORMAT)
    try:
        rows = tuple(_row(row) for row in found["rows"])
        if not rows:
            raise PageError(f"{path} has no rows")
        return _built(Bench, {"batch": 1, **found, "rows": rows, "answers": ()})
    except (KeyError, TypeError, AttributeError) as error:
        raise PageError(f"cannot read {path}: {_said(error)}") from error


def read_analysis(path: Path) -> Consistency:
    """What `tokenprune analyze` wrote.

    Raises:
        PageError: it is no such file.
    """
    found = _opened(path, ANALYSIS_FORMAT)
    try:
        curves = tuple(
            _built(
                Curve,
                {**one, "layers": tuple(map(_mean, one["layers"])), "mean": _mean(one["mean"])},
            )
            for one in found["curves"]
        )
        return _built(Consistency, {**found, "curves": curves})
    except (KeyError, TypeError, AttributeError) as error:
        raise PageError(f"cannot read {path}: {_said(error)}") from error


def _opened(path: Path, wanted: int) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PageError(f"cannot read {path}: {error}") from error
    has = found.get("format") if isinstance(found, dict) else None
    if has != wanted:
        raise PageError(f"{path} has format {has!r}, this version reads {wanted}")
    assert isinstance(found, dict)
    return found


def _row(found: dict[str, Any]) -> Row:
    types = {name: _mean(one) for name, one in found["types"].items()}
    tokens = tuple((int(layer), _number(number)) for layer, number in found["tokens"])
    numbers = {name: _number(found[name]) for name in _NUMBERS}
    return _built(Row, {**found, **numbers, "types": types, "tokens": tokens})


def _mean(found: dict[str, Any]) -> Mean:
    value = found["accuracy"] if "accuracy" in found else found["value"]
    return Mean(_number(value), _number(found["error"]), int(found["questions"]))


def _number(value: Any) -> float:
    """JSON knows no NaN."""
    return math.nan if value is None else float(value)


def _built(kind: type[T], found: dict[str, Any]) -> T:
    """An object from its fields; files may know more."""
    known: Any = fields(kind)  # type: ignore[arg-type]
    missing = [
        one.name
        for one in known
        if one.name not in found and one.default is MISSING and one.default_factory is MISSING
    ]
    if missing:
        raise KeyError(f"{kind.__name__.lower()} without {', '.join(missing)}")
    return kind(**{one.name: found[one.name] for one in known if one.name in found})


def _said(error: Exception) -> str:
    return f"{type(error).__name__} {error}" if not error.args else str(error.args[0])
