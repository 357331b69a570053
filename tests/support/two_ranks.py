"""Two processes that share the heads of a tower, joined by gloo. Importable by both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing

from support.sharded_clip import ShardedClip, pictures, tower
from tokenprune import VisualTokens, parse
from tokenprune.signals import Signals
from tokenprune_adapters.vllm.tower import ClipTaps

RANKS = 2


def gather(x: Tensor, axis: int) -> Tensor:
    """What all ranks give, joined on `axis` in the order of ranks."""
    parts = [torch.empty_like(x) for _ in range(RANKS)]
    distributed.all_gather(parts, x)
    return torch.cat(parts, axis)


def read(specs: list[str], rank: int, ranks: int, join: Any) -> list[tuple[VisualTokens, Signals]]:
    """For each spec, what one process reads from its part of the tower."""
    found = []
    for spec in specs:
        model = ShardedClip(tower(), run=3, rank=rank, ranks=ranks)
        taps = ClipTaps(model, parse(spec).strategy.signals, -2, join)
        with torch.no_grad():
            model(pictures())
        found.append(taps.observation.take())
    return found


def _rank(rank: int, folder: str, specs: list[str]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS
    )
    whole = read(specs, rank, RANKS, gather)
    alone = read(specs, rank, RANKS, lambda x, axis: torch.cat([x] * RANKS, axis))
    saved = {
        "whole": _kept(specs, whole),
        "alone": _kept(specs, alone),
        "signals": [dict(signals) for _, signals in whole],
    }
    torch.save(saved, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def _kept(specs: list[str], seen: list[tuple[VisualTokens, Signals]]) -> list[Tensor]:
    strategies = [parse(spec).strategy for spec in specs]
    return [each(*read).plan.anchors for each, read in zip(strategies, seen, strict=True)]


def run(folder: Path, specs: list[str]) -> list[dict[str, Any]]:
    """What each rank kept, with the heads of both (`whole`) and with its own (`alone`)."""
    # Forked, because to import everything anew takes longer than all the rest.
    multiprocessing.start_processes(_rank, (str(folder), specs), nprocs=RANKS, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]
