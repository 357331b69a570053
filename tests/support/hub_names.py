"""The shipped model as vLLM reads it: the same function, its weights laid out otherwise."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

HEAD_SIZES = (32, 64, 80, 96, 112, 128)
"""Sizes of heads that attention of vLLM on CPUs is compiled for."""


def export(checkpoint: Path, folder: Path) -> Path:
    """Write `checkpoint` to `folder` with the names of the hub, in float32.

    Heads of the language model get channels of zeros up to the next size that vLLM has kernels
    for. They change nothing: zeros add nothing to a dot product, rotation leaves them out
    (`partial_rotary_factor`), and queries are scaled by what a larger head divides logits by.
    """
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.md"))
    config = json.loads((checkpoint / "config.json").read_text())
    text = config["text_config"]
    size = text["head_dim"]
    wide = next(each for each in HEAD_SIZES if each >= size)
    text["head_dim"] = wide
    if wide > size:
        text["rope_parameters"]["partial_rotary_factor"] = size / wide
    config["dtype"] = text["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config))
    weights = {
        _name(name): _widened(name, weight.float(), size, wide).contiguous()
        for name, weight in load_file(checkpoint / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _name(name: str) -> str:
    """Transformers >= 5.6 leaves out a level of CLIP towers that the hub has."""
    tower = "vision_tower."
    if name.startswith(tower) and not name.startswith(f"{tower}vision_model."):
        return name.replace(tower, f"{tower}vision_model.", 1)
    return name


def _widened(name: str, weight: Tensor, size: int, wide: int) -> Tensor:
    """Weights of the language model's attention, for heads of `wide` channels."""
    if size == wide or "language_model" not in name or "self_attn" not in name:
        return weight
    if "o_proj" in name:
        heads = weight.reshape(weight.shape[0], -1, size)
        return pad(heads, (0, wide - size)).flatten(1)
    heads = weight.reshape(-1, size, weight.shape[1])
    scale = math.sqrt(wide / size) if "q_proj" in name else 1.0
    return scale * pad(heads, (0, 0, 0, wide - size)).flatten(0, 1)
