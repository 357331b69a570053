"""What reading [CLS] rows adds to a vision tower, against the tower and against the released way.

CLIP ViT-L/14-336 shapes with random weights, K = 3 layers. Whole-tower runs scatter by several
percent, so the rows are timed alone, on queries and keys of the right shape, and set against the
tower's time in the same process. Memory is what each way holds on to when the tower returns.

The last column sets the rows of a batch against one product for each image, which no strided view
is copied for.

    python tests/benchmarks/bench_rows.py [--batch 1] [--heads 16] [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionConfig, CLIPVisionModel

import tokenprune
from tokenprune_adapters.kit.attention_rows import attention

LAYERS = 3


def tower(implementation: str, dtype: torch.dtype, heads: int) -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=heads,
        image_size=336,
        patch_size=14,
        attn_implementation=implementation,
    )
    torch.manual_seed(0)
    return CLIPVisionModel(config).eval().to(dtype)


def seconds(run: Callable[[], object], rounds: int) -> float:
    run()
    taken = []
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


@torch.no_grad()
def measure(dtype: torch.dtype, batch: int, heads: int, rounds: int) -> tuple[str, ...]:
    """One row of the table."""
    pixels = torch.randn(batch, 3, 336, 336, dtype=dtype)
    query = torch.randn(batch, heads, 1, 1024 // heads, dtype=dtype)
    keys = torch.randn(batch, 577, heads, 1024 // heads, dtype=dtype).transpose(1, 2)
    sdpa, eager = tower("sdpa", dtype, heads), tower("eager", dtype, heads)

    def one_by_one() -> None:
        for q, k in zip(query, keys, strict=True):
            torch.softmax(q.float() @ k.float().mT, dim=-1)

    def released() -> Any:
        return eager(pixel_values=pixels, output_attentions=True, output_hidden_states=True)

    plain = seconds(lambda: sdpa(pixel_values=pixels), rounds)
    row = seconds(lambda: attention(query, keys), 10 * rounds)
    apart = seconds(one_by_one, 10 * rounds)
    with tokenprune.observe(sdpa, [tokenprune.ClsAttention(LAYERS)]) as seen:
        sdpa(pixel_values=pixels)
        held = sum(answer.nbytes for answer in seen.signals.values())
    maps = sum(each.nbytes for each in released().attentions)
    return (
        str(dtype).removeprefix("torch."),
        f"{LAYERS * row / plain:.2%}",
        f"{seconds(released, rounds) / plain:.2f}",
        f"{held / 2**20:.2f}",
        f"{maps / 2**20:.0f}",
        f"{row / apart:.2f}",
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--heads", type=int, default=16)
    options.add_argument("--rounds", type=int, default=5)
    given = options.parse_args()
    torch.set_num_threads(1)
    table = Table(title=f"[CLS] rows of {LAYERS} layers, CLIP ViT-L/14-336, batch {given.batch}")
    columns = ("dtype", "rows / tower", "released way / tower", "rows MiB", "released MiB")
    for column in (*columns, "rows / one by one"):
        table.add_column(column, justify="right")
    for dtype in (torch.float32, torch.bfloat16):
        table.add_row(*measure(dtype, given.batch, given.heads, given.rounds))
    Console().print(table)


if __name__ == "__main__":
    main()
