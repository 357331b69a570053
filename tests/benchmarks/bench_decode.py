"""What an attachment adds to a decode step, and a plan to memory.

A language model of 32 layers whose widths are so small that Python is all that takes time: the
worst case for hooks. Attached and plain steps take turns in one process on one thread; medians of
their CPU times, their ratio and their difference are printed. Peaks of memory are of processes of
their own, over what their inputs hold.

    python tests/benchmarks/bench_decode.py [--rounds 41]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

import torch
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import tokenprune

IMAGE, PATCHES = 99, 64
SPECS = (
    "cls-attention(layers=1) | evict(16) @ before-llm",
    "fastv | evict(16) @ after-layer(2)",
    "cls-attention(layers=1) | evict(32) @ before-llm; fastv | evict(16) @ after-layer(2)",
)
_PLAN = """
import sys, torch
from tokenprune import Plan
torch.set_num_threads(1)
x, groups = torch.randn(8, 9216, 64), torch.randint(0, 1024, (8, 9216))
Plan.group(groups[:, :64] % 9, torch.ones(8, 64))(x[:, :64])
def held(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)) / 1024
open("/proc/self/clear_refs", "w").write("5")
before = held("VmRSS")
plan = Plan.group(groups, torch.ones(8, 9216))
if sys.argv[1] == "dense":
    weights = plan.dense()
    weights @ x
else:
    plan(x), plan.source()
print(held("VmHWM") - before)
"""


def deep_llava() -> LlavaForConditionalGeneration:
    """32 decoder layers of 16 channels."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=4,
    )
    text = LlamaConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=32,
        num_attention_heads=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=PATCHES,
        attn_implementation="sdpa",
    )
    return LlavaForConditionalGeneration(config).eval()


class Chat:
    """A prompt with a picture, and its decode steps, by a model of its own, attached or not."""

    def __init__(self, spec: str | None) -> None:
        self.model = model = deep_llava()
        if spec:
            tokenprune.attach(model, spec)
        self.mask = torch.ones(1, PATCHES + 8, dtype=torch.long)
        ids = torch.tensor([[1, *[IMAGE] * PATCHES, *range(2, 9)]])
        with torch.no_grad():
            out = model(
                input_ids=ids,
                attention_mask=self.mask,
                pixel_values=torch.randn(1, 3, 32, 32),
                use_cache=True,
            )
        self.cache = out.past_key_values

    @torch.no_grad()
    def steps(self, count: int) -> float:
        """Mean CPU seconds of a step."""
        begin = time.process_time()
        for _ in range(count):
            self.mask = torch.cat([self.mask, torch.ones(1, 1, dtype=torch.long)], dim=1)
            self.model(
                input_ids=torch.tensor([[5]]),
                attention_mask=self.mask,
                past_key_values=self.cache,
                use_cache=True,
            )
        return (time.process_time() - begin) / count


def peak(form: str) -> float:
    """MiB over the inputs of a process that merges 9,216 tokens into 1,024 at batch 8."""
    made = subprocess.run(
        [sys.executable, "-c", _PLAN, form], capture_output=True, text=True, check=True
    )
    return float(made.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=41)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    console = Console()
    table = Table("attached", "plain, ms", "attached, ms", "difference, ms", "ratio")
    for spec in SPECS:
        plain, pruned = Chat(None), Chat(spec)
        plain.steps(8), pruned.steps(8)
        pairs = [(plain.steps(4), pruned.steps(4)) for _ in range(rounds)]
        ours, theirs = (statistics.median(pair[n] for pair in pairs) * 1e3 for n in (1, 0))
        more = statistics.median(b - a for a, b in pairs) * 1e3
        ratio = statistics.median(b / a for a, b in pairs)
        table.add_row(spec, f"{theirs:.2f}", f"{ours:.2f}", f"{more:+.2f}", f"{ratio:.3f}")
    console.print(table)
    console.print(
        f"merge of 9,216 tokens into 1,024, batch 8, 64 channels: peak {peak('members'):.0f} MiB "
        f"over the inputs, as a matrix {peak('dense'):.0f}"
    )


if __name__ == "__main__":
    main()
