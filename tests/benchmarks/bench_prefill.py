"""What reducing visual tokens saves of the prefill, against the arithmetic.

A mid-size LLaVA with random weights: 26 M vision tower, 103 M language model of 8 layers, 576
visual and 64 text tokens a prompt, sdpa, float32. A ratio is the median of pairs: the vanilla model
and a stage, one right after the other in one process. With one thread it is taken of the process's
own CPU time, which neighbours on a busy machine cannot lengthen much; with several, of wall time.

Few tokens use a machine less well than many, whatever makes them few: a matrix library packs the
weights anew for each product, which 128 rows pay off worse than 640. So prompts come in batches
(`--batch 1` shows that share of the machine), and `bare` is the ratio that
vanilla layers reach on text prompts of as many tokens as the stage leaves them: what is above it is
ours, what lies between it and the arithmetic is the machine's.

    python tests/benchmarks/bench_prefill.py [--batch 4] [--rounds 7] [--threads 1]
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import tokenprune

PATCHES, TEXT, IMAGE = 576, 64, 999
TOWER = {"hidden": 512, "inner": 2048, "layers": 8}
LLM = {"hidden": 1024, "inner": 2816, "layers": 8}


def mid_size_llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=TOWER["hidden"],
            intermediate_size=TOWER["inner"],
            num_hidden_layers=TOWER["layers"],
            num_attention_heads=8,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=1000,
            hidden_size=LLM["hidden"],
            intermediate_size=LLM["inner"],
            num_hidden_layers=LLM["layers"],
            num_attention_heads=16,
        ),
        image_token_id=IMAGE,
        image_seq_length=PATCHES,
        attn_implementation="sdpa",
    )
    return LlavaForConditionalGeneration(config).eval()


@dataclass(frozen=True)
class Case:
    """A stage, and how many tokens each layer of the language model computes with it."""

    name: str
    spec: str
    projected: int
    slots: tuple[int, ...]


def cases() -> list[Case]:
    whole, layers = PATCHES + TEXT, LLM["layers"]
    made = []
    for keep in (64, 128, 256, PATCHES):
        spec = f"cls-attention | evict({keep}) @ before-llm"
        made.append(Case(f"before LLM, {keep}", spec, keep, (keep + TEXT,) * layers))
    for keep in (64, 128, 256, PATCHES):
        spec = f"fastv | evict({keep}) @ after-layer(2)"
        slots = (whole,) * 2 + (keep + TEXT,) * (layers - 2)
        made.append(Case(f"after layer 2, {keep}", spec, PATCHES, slots))
    return made


def llm_flops(slots: tuple[int, ...]) -> float:
    """Linear layers and causal attention, by the tokens of each layer."""
    width, inner = LLM["hidden"], LLM["inner"]
    linear = 2 * (4 * width**2 + 3 * width * inner)
    return sum(count * linear + 2 * count**2 * width for count in slots)


def vision_flops(projected: int) -> float:
    width, inner, count = TOWER["hidden"], TOWER["inner"], PATCHES + 1
    layer = 2 * count * (4 * width**2 + 2 * width * inner) + 4 * count**2 * width
    projector = 2 * projected * (width * LLM["hidden"] + LLM["hidden"] ** 2)
    return TOWER["layers"] * layer + projector


@dataclass
class Stopwatch:
    """Seconds that the latest call spent in the language model, hooks of stages included."""

    began: float = 0.0
    seconds: float = 0.0

    def start(self, *args: object) -> None:
        self.began = now()

    def stop(self, *args: object) -> None:
        self.seconds = now() - self.began


def now() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


@torch.no_grad()
def timed(model: Any, inputs: dict[str, Any], spec: str | None) -> tuple[float, float]:
    """Seconds of the language model, and to the first token."""
    watch, llm = Stopwatch(), model.model.language_model
    first = llm.register_forward_pre_hook(watch.start)
    with tokenprune.attach(model, spec) if spec else nullcontext():
        last = llm.register_forward_hook(watch.stop)
        begin = now()
        model(**inputs, logits_to_keep=1, use_cache=True).logits.argmax(-1)
        total = now() - begin
        last.remove()
    first.remove()
    return watch.seconds, total


def text_prompts(batch: int, count: int) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, IMAGE, (batch, count))}


def image_prompts(batch: int) -> dict[str, Any]:
    inputs = text_prompts(batch, PATCHES + TEXT)
    inputs["input_ids"][:, 5 : 5 + PATCHES] = IMAGE
    return {**inputs, "pixel_values": torch.randn(batch, 3, 336, 336)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = mid_size_llava()
    inputs = image_prompts(options.batch)
    timed(model, inputs, None)
    lengths = sorted({count for case in cases() for count in case.slots})
    bare: dict[int, list[float]] = {count: [] for count in lengths}
    vanilla: list[tuple[float, float]] = []
    ratios: dict[str, list[tuple[float, float]]] = {case.name: [] for case in cases()}
    for _ in range(options.rounds):
        for case in cases():
            # Its own vanilla run beside each stage: load on the machine changes within a round.
            vanilla.append(timed(model, inputs, None))
            both = zip(timed(model, inputs, case.spec), vanilla[-1], strict=True)
            llm, first = (new / old for new, old in both)
            ratios[case.name].append((llm, first))
        for count, measured in bare.items():
            whole = timed(model, text_prompts(options.batch, PATCHES + TEXT), None)[0]
            part = timed(model, text_prompts(options.batch, count), None)[0]
            measured.append(part / whole)
    stock_llm = llm_flops((PATCHES + TEXT,) * LLM["layers"])
    stock_vision = vision_flops(PATCHES)
    ran = f"batch {options.batch}, {options.threads} thread(s)"
    table = Table(title=f"medians of {options.rounds} pairs, {ran}")
    columns = ("LLM", "bare", "analytic", "off by", "first token", "analytic", "off by")
    for heading in ("visual tokens kept", *columns):
        justify = "left" if heading.startswith("visual") else "right"
        table.add_column(heading, justify=justify, no_wrap=True)
    for case in cases():
        llm, first = (statistics.median(each) for each in zip(*ratios[case.name], strict=True))
        of_llm = llm_flops(case.slots)
        expected = of_llm / stock_llm
        both = (of_llm + vision_flops(case.projected)) / (stock_llm + stock_vision)
        table.add_row(
            case.name,
            f"{llm:.3f}",
            f"{statistics.mean(statistics.median(bare[count]) for count in case.slots):.3f}",
            *(f"{expected:.3f}", f"{llm / expected - 1:+.0%}"),
            *(f"{first:.3f}", f"{both:.3f}", f"{first / both - 1:+.0%}"),
        )
    console = Console(width=100)
    console.print(table)
    seconds = [statistics.median(each) for each in zip(*vanilla, strict=True)]
    console.print(f"vanilla: LLM prefill {seconds[0]:.2f} s, first token {seconds[1]:.2f} s")


if __name__ == "__main__":
    main()
