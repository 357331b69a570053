"""What adapters of LLaVA models share: reading configs and towers."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokenprune.adapter import NotCopyable, TowerAdapter
from tokenprune.budget import Budgeted
from tokenprune.errors import AttachError, UnsupportedError
from tokenprune.plugins import registry
from tokenprune.spec import shown
from tokenprune.strategy import Stage

from ..marks import marked


def hide_marks(core: nn.Module, args: object, output: Any) -> None:
    """Callers see the features that entered the language model, without marks."""
    for name in ("image_hidden_states", "video_hidden_states"):
        features = getattr(output, name, None)
        if features is not None:
            setattr(output, name, features[~marked(features)])


class SameParts(NotCopyable):
    """The hook before a model that looks whether the parts with hooks are still at work.

    Args:
        core: the model without its head.
    """

    def __init__(self, core: nn.Module) -> None:
        self.parts = dict(core.named_children())

    def before(self, core: nn.Module, args: object) -> None:
        for name, part in self.parts.items():
            present = getattr(core, name, None)
            if present is part:
                continue
            # What was wrapped (FSDP, torch.compile) still runs, and its hooks with it.
            if present is None or not any(each is part for each in present.modules()):
                raise AttachError(
                    f"{name} of the {type(core).__name__} was replaced while it is attached "
                    "(PEFT's merge_and_unload does so), and took its hooks along, so nothing "
                    "would be reduced as it should; detach first, and attach again"
                )


def tower_adapter(tower: nn.Module) -> TowerAdapter:
    """The adapter of the model's vision tower."""
    known = registry()
    return known.claiming(known.towers, tower, None).factory()


def check_select_strategy(core: Any, tower: nn.Module, has_cls: bool) -> None:
    """The projector must get all patches of a picture, and patches alone."""
    strategy, supported = core.config.vision_feature_select_strategy, "default"
    does = "keeps [CLS] among the patches"
    if not has_cls:
        does, supported = f"drops the first patch of a {type(tower).__name__}", "full"
    if strategy != supported:
        raise UnsupportedError(
            f"vision_feature_select_strategy={strategy!r} {does}; only {supported!r} is supported"
        )


def check_budgets(stages: tuple[Stage, ...]) -> None:
    """Refuse budgets per frame in models that take pictures only."""
    for step in (step for stage in stages for step in stage.strategy.steps):
        if isinstance(step, Budgeted) and step.per == "frame":
            raise UnsupportedError(f"per='frame' in {shown(step)!r}: this model has no frames")


def feature_layer(config: Any) -> int:
    """Block whose output is the features, Python style; the last of several.

    `vision_feature_layer` indexes hidden states, of which there is one more than blocks: only
    negative numbers mean the same in both lists.
    """
    layer = config.vision_feature_layer
    layer = layer[-1] if isinstance(layer, (list, tuple)) else layer
    if layer == 0:
        raise UnsupportedError("vision_feature_layer=0 reads the embeddings, which no layer scores")
    return int(layer) if layer < 0 else int(layer) - 1
