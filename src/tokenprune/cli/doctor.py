"""`tokenprune doctor`: versions beside the tested ones, and every model beside a vanilla run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from importlib.util import find_spec

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from ..doctor import Comparison, Examination, Version, examine, examine_model
from ..jsonable import jsonable
from ..loading import load_model, quiet, usable_device
from ..shipped_adapters import pocket_model
from .console import console, table

POCKET = "pocket"
COLORS = {"ok": "green", "failed": "red", "refused": "red", "unclear": "yellow"}


def run_doctor(
    model: str | None,
    as_json: bool,
    device: str,
    dtype: str,
) -> None:
    """Compare, show what came out, and exit with 1 if anything failed."""
    # What models and plugins print stands beside the JSON, not in it.
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        found = _examined(model, as_json, device, dtype, console())
    if as_json:
        typer.echo(json.dumps(jsonable(found.as_dict()), indent=2, allow_nan=False))
    else:
        show(found, console())
    if found.failed:
        raise typer.Exit(1)


def _examined(
    model: str | None, as_json: bool, device: str, dtype: str, out: Console
) -> Examination:
    if find_spec("transformers") is not None:
        quiet()
    if model is not None:
        return examine_model(_loaded(model, device, dtype), model)
    device = usable_device(device)
    if as_json:
        return examine(device)
    with out.status("comparing") as status:
        return examine(device, progress=lambda name: status.update(f"comparing {name}"))


def _loaded(name: str, device: str, dtype: str) -> nn.Module:
    if name == POCKET:
        name = str(pocket_model().CHECKPOINT)
    model: nn.Module = load_model(name, device, dtype)
    return model


def show(found: Examination, out: Console) -> None:
    """Print the versions, a line for each comparison, and a sentence."""
    about = f"tokenprune {found.tokenprune}, {found.platform}, {found.device}, {found.dtype}"
    out.print(about + "\n", markup=False, soft_wrap=True)
    out.print(_versions(found), "")
    if found.checkpoint:
        name = found.comparisons[0].model
        about = f"{name} of {found.checkpoint}, asked about random pictures with random prompts"
        out.print(about + "\n", markup=False, soft_wrap=True)
    out.print(_comparisons(found), "")
    for reason, failed in _reasons(found).items():
        more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        about = f"{failed[0].model}, {failed[0].where}{more}: {reason}"
        out.print(about, markup=False, soft_wrap=True)
    out.print(verdict(found), markup=False, soft_wrap=True)


def _versions(found: Examination) -> Table:
    shown = table("library", "found", "tested", "")
    for each in found.versions:
        style = "yellow" if each.found and each.note else "dim"
        shown.add_row(each.name, each.found or "-", each.tested, f"[{style}]{each.note}[/]")
    return shown


def _comparisons(found: Examination) -> Table:
    """Of many models, or of one checkpoint and then with what was attached."""
    one = bool(found.checkpoint)
    shown = table(*["model"] * (not one), "compared", "", "largest gap", *["attached"] * one)
    shown.columns[0].no_wrap = True
    for each in found.comparisons:
        style = COLORS.get(each.outcome, "dim")
        gap = "-" if each.gap is None else f"{each.gap:.0e}" if each.gap else "0"
        cells = [escape(each.where) or "-", f"[{style}]{each.outcome}[/]", gap]
        cells = [*cells, escape(each.spec) or "-"] if one else [escape(each.model), *cells]
        shown.add_row(*cells)
    return shown


def _reasons(found: Examination) -> dict[str, list[Comparison]]:
    """What failed, by the reason, of which there is often just one."""
    reasons: dict[str, list[Comparison]] = {}
    for each in found.failed:
        reasons.setdefault(each.reason, []).append(each)
    return reasons


def verdict(found: Examination) -> str:
    """A sentence on what was found, and on what to do."""
    made = [each for each in found.comparisons if each.outcome in COLORS]
    untested = ", ".join(f"{each.name} {each.found}" for each in found.untested)
    if not made:
        return (
            "Nothing was compared, because no library of a supported model is installed: "
            "pip install 'tokenprune-vlm[hf]'"
        )
    if not found.failed:
        there = f", on versions that were never tested ({untested}), too" if untested else ""
        agree = f"All {len(made)} comparisons agree" if len(made) > 1 else "The comparison agrees"
        return f"{agree} with vanilla runs by hand{there}."
    outcomes = {each.outcome for each in found.failed}
    if outcomes == {"refused"} and found.checkpoint:
        return "What is refused cannot be done with this model; the reason is above."
    if outcomes == {"unclear"} and found.checkpoint and found.dtype == "float32":
        return (
            "Nothing is shown: this model answers random pictures alike, whatever is kept of them."
        )
    if found.dtype != "float32" and all(each.gap is not None for each in found.failed):
        return f"In {found.dtype} rounding may be the reason; compare with --dtype float32."
    todo = "please report it with the output of `tokenprune doctor --json`"
    if untested:
        todo = f"install tested versions: {_wanted(found.untested)}; if it still fails, {todo}"
    names = ", ".join(dict.fromkeys(each.model for each in found.failed))
    return f"Do not use tokenprune with {names} here; {todo}."


def _wanted(untested: Sequence[Version]) -> str:
    """How to get tested versions; Python is not pip's to install."""
    python = [f"Python {each.tested}" for each in untested if each.name == "python"]
    others = " ".join(f"'{each.requirement}'" for each in untested if each.name != "python")
    return ", ".join([*python, *[f"pip install {others}"] * bool(others)])
