"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Checkpoint = Annotated[str, typer.Option(help="Folder of a checkpoint, or a name on the hub.")]
Model = Annotated[str, typer.Option(help="pocket, folder of a checkpoint, or a name on the hub.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...; the GPU if there is one.")]
DType = Annotated[str, typer.Option(help="float32, bfloat16, ...; as stored.")]
Questions = Annotated[int | None, typer.Option(min=1, help="Only the first ones.")]
Batch = Annotated[
    int | None, typer.Option(min=1, help="Questions in one generate [1; pocket: 50].")
]
LongestAnswer = Annotated[int | None, typer.Option(min=1, help="Longest answer [16; pocket: 1].")]
Data = Annotated[
    Path | None,
    typer.Option(help="Pictures and questions: JSON lines with their answers, or a folder."),
]
