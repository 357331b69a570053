"""Anatomy of a model of transformers: its parts by role, and what its config says of pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedError


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Parts of a whole model, by role. Nothing here depends on its class.

    Attributes:
        model: the whole model, including its LM head.
        core: the model without its head, which puts image features among the embeddings.
        llm: the language model, which gets embeddings.
        towers: modules that encode pixels.
        projector: maps features of the towers to the width of the language model; None where
            nobody works before it.
    """

    model: nn.Module
    core: Any
    llm: Any
    towers: tuple[nn.Module, ...]
    projector: Any

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers of the language model."""
        layers: nn.ModuleList = self.llm.layers
        return layers

    @property
    def patches_per_crop(self) -> int:
        """Number of patches of a picture, crop or frame."""
        return patches_per_crop(self.core.config)

    def placeholders(self, ids: Tensor, kind: Literal["image", "video"]) -> Tensor:
        """Which of the token ids stand for features of pictures or of videos, as bool."""
        token = getattr(self.core.config, f"{kind}_token_id", None)
        return torch.zeros_like(ids, dtype=torch.bool) if token is None else ids.eq(token)

    @property
    def select_strategy(self) -> str:
        """``"default"`` where the first token of the tower is left out, ``"full"`` where not."""
        return select_strategy(self.core.config)

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Hidden states that are concatenated to features, as configured; empty where it is one."""
        layer = self.core.config.vision_feature_layer
        return tuple(layer) if isinstance(layer, (list, tuple)) else ()

    @property
    def feature_layer(self) -> int:
        """Block whose output is the features, Python style; the last of several."""
        return feature_layer(self.core.config)


def patches_per_crop(config: Any) -> int:
    """Number of patches of a picture, crop or frame, by the config of a model."""
    vision = config.vision_config
    return int(vision.image_size // vision.patch_size) ** 2


def select_strategy(config: Any) -> str:
    """``"default"`` where the first token of the tower is left out, ``"full"`` where not."""
    return str(config.vision_feature_select_strategy)


def feature_layer(config: Any) -> int:
    """Block whose output is the features by the config of a model; the last of several.

    The config indexes hidden states, of which there is one more than blocks: only negative numbers
    mean the same in both lists.
    """
    layer = config.vision_feature_layer
    layer = layer[-1] if isinstance(layer, (list, tuple)) else layer
    if layer == 0:
        raise UnsupportedError("vision_feature_layer=0 reads the embeddings, which no layer scores")
    return int(layer) if layer < 0 else int(layer) - 1


def configured_layer(config: Any, otherwise: int) -> int:
    """As `feature_layer`, or another number where the config does not say."""
    return feature_layer(config) if hasattr(config, "vision_feature_layer") else otherwise


def aspect_ratio(config: Any) -> str:
    """How many crops a grid of tiles may hold before it shrinks, by the config of a model."""
    return str(config.vision_aspect_ratio)


def attention_of(llm: nn.Module) -> str:
    """Name of the attention implementation that a language model is set to."""
    config: Any = llm.config
    return str(config._attn_implementation)


def makes_cache(llm: nn.Module, asked: bool | None) -> bool:
    """Whether a language model that gets no cache makes one.

    Args:
        llm: the language model.
        asked: its argument `use_cache`.
    """
    config: Any = llm.config
    wanted = getattr(config, "use_cache", False) if asked is None else asked
    checkpoints = getattr(llm, "gradient_checkpointing", False) and llm.training
    return bool(wanted) and not (checkpoints and torch.is_grad_enabled())


ATTENTION, RECURRENT = "full_attention", "linear_attention"
"""Kinds of decoder layers that are served; the second has a state that runs along."""


def odd_layers(llm: nn.Module) -> str:
    """Kinds of decoder layers that are not served, such as windows; empty if there are none."""
    config: Any = llm.config
    kinds = set(getattr(config, "layer_types", None) or ())
    windowed = getattr(config, "sliding_window", None) and getattr(
        config, "use_sliding_window", True
    )
    if kinds - {ATTENTION, RECURRENT} or (not kinds and windowed):
        return ", ".join(sorted(kinds - {ATTENTION})) or "sliding_window"
    return ""


def has_states(llm: nn.Module) -> bool:
    """Whether some decoder layers have a state that runs along, in place of keys and values."""
    config: Any = llm.config
    return RECURRENT in (getattr(config, "layer_types", None) or ())


def part(owner: Any, role: str, *paths: str) -> Any:
    """What is at the first of some paths that is there, such as ``"encoder.layers"``.

    Raises:
        UnsupportedError: nothing is at any of them.
    """
    for path in paths:
        found = owner
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is not None:
            return found
    raise UnsupportedError(f"{type(owner).__name__} has no {role} (looked for {', '.join(paths)})")
