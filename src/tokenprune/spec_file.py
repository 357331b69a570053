"""Specs in a small file beside a checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ._version import __version__
from .errors import SpecError
from .spec import parse_schedule, spec_of, stages_of
from .strategy import Stage

FILE = "tokenprune.json"
_FORMAT = 1


def save_pretrained(folder: str | os.PathLike[str], *stages: Stage | str) -> Path:
    """Write what `attach` takes into `tokenprune.json`, beside a checkpoint.

        save_pretrained("my-checkpoint", "vtc-cls(keep=128)")
        attach(model, *from_pretrained("my-checkpoint"))

    Recipes are written out, so that the file keeps its meaning if a recipe's defaults change.

    Args:
        folder: folder of the checkpoint; made where it does not exist.
        stages: specs, or stages that can be written as one.

    Returns:
        The file.

    Raises:
        SpecError: no stage, one that cannot be read, or a step that no plugin offers by name.
    """
    parsed = stages_of(stages)
    if not parsed:
        raise SpecError("nothing to save: give stages, e.g. 'vtc-cls(keep=128)'")
    content = {
        "format": _FORMAT,
        "tokenprune": __version__,
        "spec": "; ".join(map(spec_of, parsed)),
    }
    file = Path(folder) / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return file


def from_pretrained(name: str | os.PathLike[str]) -> tuple[Stage, ...]:
    """Read the stages that `save_pretrained` wrote.

    Args:
        name: a folder, or the name of a checkpoint on the hub (this needs transformers).

    Raises:
        SpecError: no such file, one that says nothing, or a spec that cannot be read.
        UnknownNameError: a step of a plugin that is not installed.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        file = folder / FILE
        if not file.is_file():
            raise SpecError(f"there is no {FILE} in {folder}; save_pretrained writes one")
    else:
        file = _downloaded(str(name))
    wrong = f'{file} must hold a JSON object with "format" and "spec"'
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise SpecError(wrong) from error
    # First, since other formats may say the rest in another way.
    if version != _FORMAT:
        raise SpecError(f"{file} has format {version!r}, this version reads {_FORMAT}; upgrade")
    spec = content.get("spec")
    if not isinstance(spec, str):
        raise SpecError(f"{wrong}, a string; its spec is {spec!r}")
    return parse_schedule(spec)


def _downloaded(name: str) -> Path:
    try:
        from transformers.utils import cached_file

        found = cached_file(name, FILE)
    except (ImportError, OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise SpecError(
            f"{name!r} is no folder, nor a checkpoint with a {FILE}: {first}"
        ) from error
    return Path(str(found))
