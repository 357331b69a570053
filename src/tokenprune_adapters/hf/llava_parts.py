"""Parts that adapters of LLaVA models share: checks of configs, towers and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.adapter import TowerAdapter
from tokenprune.budget import Budgeted
from tokenprune.errors import AttachError, UnsupportedError
from tokenprune.hooks import NotCopyable, Removable
from tokenprune.plugins import registry
from tokenprune.spec import shown
from tokenprune.strategy import Stage
from tokenprune.untraced import untraced

from ..kit.before_projector import other_layer
from ..kit.marks import marked
from ..kit.method_wrapper import is_replaced, wrap_method
from .anatomy import Anatomy
from .checks import Encoders
from .names import Call, Signature
from .outputs import Output

PRIVATE = "tokenprune_"
"""Prefix of the arguments by which our hooks talk to each other."""


def hide_marks(core: nn.Module, args: object, output: Any) -> Any:
    """Callers see the features that entered the language model, without marks. One sync."""
    return Output(output).show(_without_marks)


def hide_any_marks(core: nn.Module, args: object, output: Any) -> Any:
    """The same of models some releases of which show no features."""
    return Output(output).show(_without_marks, required=False)


@untraced
def _without_marks(features: list[Tensor]) -> list[Tensor]:
    dropped = [marked(each) for each in features]
    counts = torch.stack([(~each).sum() for each in dropped]).tolist()
    # Kept rows first, in their order: how many there are is known, so nothing waits for a shape.
    return [
        each.flatten(0, -2).index_select(0, gone.flatten().to(torch.uint8).argsort(stable=True)[:n])
        for each, gone, n in zip(features, dropped, counts, strict=True)
    ]


def keep_private(parts: Anatomy) -> Iterator[Removable]:
    """Hooks that take our arguments away before a vision tower gets them.

    Models hand arguments that they don't know to the tower as well as to the language model, and
    from there to attention kernels, some of which check their keywords.
    """
    for tower in parts.towers:
        yield tower.register_forward_pre_hook(_drop_private, with_kwargs=True)


def _drop_private(
    tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {name: given for name, given in kwargs.items() if not name.startswith(PRIVATE)}


class SameParts(NotCopyable):
    """Hook before a model that looks whether the parts with hooks are still at work.

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


def check_select_strategy(parts: Anatomy, has_cls: bool) -> None:
    """Refuse a model whose projector gets anything but all patches of a picture."""
    strategy, supported = parts.select_strategy, "default"
    does = "keeps [CLS] among the patches"
    if not has_cls:
        does, supported = f"drops the first patch of a {type(parts.towers[0]).__name__}", "full"
    if strategy != supported:
        raise UnsupportedError(
            f"vision_feature_select_strategy={strategy!r} {does}; only {supported!r} is supported"
        )


def encode_untraced(parts: Anatomy) -> Iterator[Removable]:
    """Wrappers that keep what encodes pictures and videos out of `torch.compile`."""
    for name in ("get_image_features", "get_video_features"):
        if hasattr(parts.core, name) and not is_replaced(parts.core, name):
            yield from wrap_method(parts.core, name, lambda call, arguments: call())


def same_layers(parts: Anatomy, encoders: Encoders) -> Iterator[Removable]:
    """Wrappers that refuse other feature layers in a call, where several are configured.

    What reaches the projector tells a layer by its values, but several are concatenated.
    """
    if not parts.feature_layers:
        return
    for name in encoders:
        signature = Signature.of(getattr(parts.core, name))
        yield from wrap_method(parts.core, name, partial(_refuse_layers, parts, signature))


def _refuse_layers(
    parts: Anatomy, signature: Signature, call: Callable[[], Any], arguments: Mapping[str, Any]
) -> Any:
    asked = Call(signature, (), dict(arguments)).feature_layer
    layers = tuple(asked) if isinstance(asked, (list, tuple)) else (asked,)
    if asked is not None and layers != parts.feature_layers:
        raise other_layer()
    return call()


def check_budgets(stages: tuple[Stage, ...]) -> None:
    """Refuse budgets per frame in models that take pictures only."""
    for step in (step for stage in stages for step in stage.strategy.steps):
        if isinstance(step, Budgeted) and step.per == "frame":
            raise UnsupportedError(f"per='frame' in {shown(step)!r}: this model has no frames")
