"""Conventions of transformers, with left padding: how a `ModelCase` calls a model by default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def next_logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """`(batch, vocabulary)` logits of each prompt's next token."""
    logits: Tensor = model(**inputs).logits
    return logits[:, -1]


def generate(model: nn.Module, inputs: dict[str, Any], steps: int) -> tuple[Tensor, Tensor]:
    """Greedy `(batch, steps)` ids and `(batch, steps, vocabulary)` logits, with a KV cache."""
    made = model.generate(  # type: ignore[operator]
        **inputs,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return made.sequences[:, -steps:], torch.stack(made.logits, dim=1)


def extend(inputs: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """The same prompts with `(batch, steps)` text ids appended."""
    return {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], ids], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(ids)], dim=1),
    }


def cache_lengths(model: nn.Module, inputs: dict[str, Any]) -> list[int]:
    """Slots that a prefill stores, per layer."""
    return [layer.keys.shape[-2] for layer in cache(model, inputs).layers]


def cache(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """The KV cache that a prefill fills."""
    return _cache_of(model(**inputs, use_cache=True))


def turns(model: nn.Module, several: Sequence[dict[str, Any]]) -> Tensor:
    """`(1, vocabulary)` logits after the last of several turns of one prompt, on one cache."""
    past, mask = None, None
    for inputs in several:
        new = inputs["attention_mask"]
        mask = new if mask is None else torch.cat([mask, new], dim=1)
        given = {**inputs, "attention_mask": mask}
        output = model(**given, use_cache=True, past_key_values=past)
        past = _cache_of(output)
    logits: Tensor = output.logits
    return logits[:, -1]


def joined(several: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Inputs of one prompt that says all of the turns: ids and masks in a row, pictures below."""
    names = {name: None for inputs in several for name in inputs}
    made: dict[str, Any] = {}
    for name in names:
        parts = [inputs[name] for inputs in several if name in inputs]
        inline = parts[0].ndim == 2 and parts[0].shape == several[0]["input_ids"].shape
        inline = inline or name in ("input_ids", "attention_mask")
        made[name] = torch.cat(parts, dim=1 if inline else 0)
    return made


def beams(model: nn.Module, inputs: dict[str, Any], steps: int, use_cache: bool) -> Tensor:
    """`(batch, steps)` ids of a search with two beams; placeholders of pictures are no words."""
    names = ("image_token_id", "video_token_id")
    ids = [getattr(model.config, name, None) for name in names]
    made: Tensor = model.generate(  # type: ignore[operator]
        **inputs,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        num_beams=2,
        suppress_tokens=[each for each in ids if each is not None],
        use_cache=use_cache,
    )
    return made[:, -steps:]


def _cache_of(output: Any) -> Any:
    # The name since transformers 5.24, and the one before.
    return next(output[name] for name in ("cache", "past_key_values") if name in output)
