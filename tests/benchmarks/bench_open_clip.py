"""What reduction inside an open_clip tower saves, and how far embeddings drift.

Speed: random weights, encode time of a pruned tower over that of the same tower unpruned, in turns
(median of paired ratios), beside the ratio of multiply-adds. Drift: the trained tower of the
pocket model, put into open_clip's class; its [CLS] knows which digits a picture shows in which
colour, so a linear read-out, fitted on unpruned embeddings of training pictures, tells how many of
its answers survive.

    python tests/benchmarks/bench_open_clip.py  # all three tables
    python tests/benchmarks/bench_open_clip.py speed [--model ViT-B-16] [--batch 4] [--rounds 7]
    python tests/benchmarks/bench_open_clip.py rows [--model ViT-B-32] [--batch 4] [--rounds 7]
    python tests/benchmarks/bench_open_clip.py drift [--pictures 500]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import tokenprune
from support.open_clip_towers import from_transformers
from tokenprune import ClsAttention
from tokenprune_adapters import pocket


def tower_of(name: str, dtype: torch.dtype) -> nn.Module:
    config = open_clip.get_model_config(name)
    torch.manual_seed(0)
    vision = CLIPVisionCfg(**config["vision_cfg"])
    return _build_vision_tower(config["embed_dim"], vision).eval().to(dtype)


def schedules(layers: int) -> dict[str, str]:
    third, quarter, half = round(layers / 3), layers // 4, layers // 2
    evict = "cls-attention(layers=1) | evict"
    return {
        f"evict(0.5) after {third}": f"{evict}(0.5) @ after-layer({third})",
        f"evict(0.5) after {quarter}": f"{evict}(0.5) @ after-layer({quarter})",
        f"evict(0.25) after {quarter}": f"{evict}(0.25) @ after-layer({quarter})",
        f"evict(0.5) after {half}": f"{evict}(0.5) @ after-layer({half})",
        "evict(0.7) three times": "; ".join(
            f"{evict}(0.7) @ after-layer({layer})" for layer in (quarter, half, 3 * layers // 4)
        ),
        "tome(0.92) every layer": "; ".join(
            f"tome(0.92) @ after-layer({layer})" for layer in range(1, layers)
        ),
        f"tome(0.7) after {third}, {2 * third}": f"tome(0.7) @ after-layer({third}); "
        f"tome(0.7) @ after-layer({2 * third})",
    }


def multiply_adds(tower: Any, tokens: list[int]) -> float:
    """Of all blocks, the patch embedding and nothing else, which is less than 1 %."""
    width = tower.transformer.width
    hidden = tower.transformer.resblocks[0].mlp.c_fc.out_features
    patch = tower.conv1.weight[0].numel() * width * (tokens[0] - 1)
    return patch + sum(n * (4 * width**2 + 2 * width * hidden) + 2 * n**2 * width for n in tokens)


def tokens_per_block(tower: Any, run: Callable[[], object]) -> list[int]:
    seen: list[int] = []
    handles = [
        block.ln_2.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
        for block in tower.transformer.resblocks
    ]
    run()
    for handle in handles:
        handle.remove()
    return seen


def seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def paired(
    run: Callable[[], object], changed: Callable[[], AbstractContextManager[Any]], rounds: int
) -> list[float]:
    """Ratios of a run in the context `changed` to the run before it, after one warm-up of both."""
    ratios = []
    for number in range(rounds + 1):
        plain = seconds(run)
        with changed():
            other = seconds(run)
        if number:
            ratios.append(other / plain)
    return ratios


def shown(ratios: list[float]) -> str:
    low, high = min(ratios), max(ratios)
    return f"{statistics.median(ratios):.3f} ({low:.2f}-{high:.2f})"


@torch.inference_mode()
def speed(options: argparse.Namespace) -> Table:
    table = Table(title=f"encode time, {options.model}, batch {options.batch}, {options.dtype}")
    for column in ("schedule", "tokens at the end", "time ratio", "FLOPs ratio", "time / FLOPs"):
        table.add_column(column, justify="right")
    dtype = getattr(torch, options.dtype)
    tower: Any = tower_of(options.model, dtype)
    pixels = torch.randn(options.batch, 3, *tower.image_size, dtype=dtype)

    def run() -> object:
        return tower(pixels)

    every = tokens_per_block(tower, run)
    for name, spec in schedules(len(tower.transformer.resblocks)).items():
        with tokenprune.attach(tower, spec):
            some = tokens_per_block(tower, run)
        flops = multiply_adds(tower, some) / multiply_adds(tower, every)
        ratios = paired(run, lambda spec=spec: tokenprune.attach(tower, spec), options.rounds)  # type: ignore[misc]
        relative = f"{statistics.median(ratios) / flops:.2f}"
        table.add_row(name, f"{some[-1]} of {every[-1]}", shown(ratios), f"{flops:.3f}", relative)
    return table


@torch.inference_mode()
def rows(options: argparse.Namespace) -> Table:
    """The tap alone against the tower: whole towers scatter by more than it costs."""
    from tokenprune_adapters.kit.query_key_maps import QueryKeyMaps

    table = Table(title=f"[CLS] rows of 3 layers, {options.model}, batch {options.batch}")
    for column in ("dtype", "3 rows / tower", "whole tower, observed / not"):
        table.add_column(column, justify="right")
    for dtype in (torch.float32, torch.bfloat16):
        tower: Any = tower_of(options.model, dtype)
        pixels = torch.randn(options.batch, 3, *tower.image_size, dtype=dtype)
        attention = tower.transformer.resblocks[0].attn
        tokens = tower.positional_embedding.shape[0]
        x = torch.randn(options.batch, tokens, tower.transformer.width, dtype=dtype)

        def run(tower: Any = tower, pixels: Tensor = pixels) -> object:
            return tower(pixels)

        def row(attention: Any = attention, x: Tensor = x) -> object:
            return QueryKeyMaps.of(attention).first_row(x, x)

        run(), row()
        alone = statistics.median(seconds(row) for _ in range(10 * options.rounds))
        plain = statistics.median(seconds(run) for _ in range(options.rounds))
        ratios = paired(
            run,
            lambda tower=tower: tokenprune.observe(tower, [ClsAttention(3)]),  # type: ignore[misc]
            options.rounds,
        )
        name = str(dtype).removeprefix("torch.")
        table.add_row(name, f"{3 * alone / plain:.2%}", shown(ratios))
    return table


@torch.inference_mode()
def drift(options: argparse.Namespace) -> Table:
    from tokenprune_adapters.pocket.drawing import COLOURS, KINDS
    from train_pocket.tower import _facts, pixels

    model, _ = pocket.load()
    tower = from_transformers(model.model.vision_tower)
    choices = 1 + len(COLOURS)

    def facts(scenes: list[pocket.Scene]) -> Tensor:
        return nn.functional.one_hot(_facts(scenes)[0], choices).flatten(1).float()

    def embed(scenes: list[pocket.Scene]) -> Tensor:
        return torch.cat([tower(pixels(scenes[n : n + 100])) for n in range(0, len(scenes), 100)])

    lessons = [pocket.draw(number, "train") for number in range(options.lessons)]
    known, wide = embed(lessons), torch.float64
    known = torch.cat([known, torch.ones(len(known), 1)], dim=1).to(wide)
    ridge = 1e-3 * torch.eye(known.shape[1], dtype=wide)
    read = torch.linalg.solve(known.T @ known + ridge, known.T @ facts(lessons).to(wide)).float()

    tests = [pocket.draw(number) for number in range(options.pictures)]
    truth = _facts(tests)[0]

    def answers(embedded: Tensor) -> Tensor:
        scores = embedded @ read[:-1] + read[-1]
        return scores.unflatten(1, (len(KINDS), choices)).argmax(-1)

    there = truth > 0
    vanilla = embed(tests)
    said = answers(vanilla)
    table = Table(title=f"drift, the pocket model's tower in open_clip, {len(tests)} pictures")
    for column in ("schedule", "tokens", "cosine mean (5 %)", "answers kept", "right"):
        table.add_column(column, justify="right")
    right = (said == truth)[there].float().mean()
    table.add_row("unpruned", "64", "1", "100 %", f"{right:.1%}")
    for spec in DRIFTS:
        with tokenprune.attach(tower, spec) as pruned:
            got = embed(tests)
            tokens = pruned.report.images[0].after
        cosine = nn.functional.cosine_similarity(got, vanilla)
        low = cosine.quantile(0.05)
        now = answers(got)
        kept = (now == said)[there].float().mean()
        table.add_row(
            spec,
            str(tokens),
            f"{cosine.mean():.3f} ({low:.3f})",
            f"{kept:.1%}",
            f"{(now == truth)[there].float().mean():.1%}",
        )
    return table


DRIFTS = (
    *(
        f"{what} @ after-layer({layer})"
        for layer in (1, 2, 4)
        for what in (
            "cls-attention(layers=1) | evict(0.5)",
            "cls-attention(layers=1) | evict(0.25)",
            "tome(0.5)",
            "tome(0.5, metric='keys', layer=-1)",
            "random | evict(0.5)",
        )
    ),
    "cls-attention(layers=3) | evict(0.5) @ after-layer(4)",
    "; ".join(f"cls-attention(layers=1) | evict(0.7) @ after-layer({n})" for n in (2, 3, 4)),
    "tome(0.7) @ after-layer(2); tome(0.7) @ after-layer(4)",
)


TABLES = {"speed": speed, "rows": rows, "drift": drift}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("what", nargs="?", choices=list(TABLES), help="all, if not given")
    options.add_argument("--model", default="ViT-B-16")
    options.add_argument("--dtype", default="float32")
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--pictures", type=int, default=500)
    options.add_argument("--lessons", type=int, default=3000)
    given = options.parse_args()
    torch.set_num_threads(1)
    for what in [given.what] if given.what else TABLES:
        Console(width=140).print(TABLES[what](given))


if __name__ == "__main__":
    main()
