"""Two processes with a tiny LLaVA between them: shards, or heads split. Run by torchrun.

Arguments: a folder with the checkpoint. Each process prints a line for each combination.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlavaForConditionalGeneration

import tokenprune
from support.llava import collate, prompts, tiny_llava

SPECS = {
    "rows": "cls-attention | evict(4)",
    "merging": "tome(5)",
    "inside": "uniform | evict(4) @ after-layer(1)",
    "text": "fastv | evict(4) @ after-layer(1)",
}


def logits(model: Any, spec: str) -> Tensor:
    with tokenprune.attach(model, spec), torch.no_grad():
        found: Tensor = model(**collate(prompts())).logits
    return found


def compared(kind: str, model: Any) -> None:
    plain = tiny_llava()
    for name, spec in SPECS.items():
        try:
            gap = float((logits(model, spec) - logits(plain, spec)).abs().max())
            said = "equal" if gap < 1e-4 else f"off by {gap}"
        except tokenprune.UnsupportedError as error:
            said = f"refused: {error}"
        sys.stdout.write(f"{kind} {name} {said}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    sharded = tiny_llava()
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    compared("fsdp", fully_shard(sharded, mesh=mesh))
    split = LlavaForConditionalGeneration.from_pretrained(
        sys.argv[1], tp_plan="auto", dtype=torch.float32
    )
    compared("tp", split)
    distributed.destroy_process_group()
