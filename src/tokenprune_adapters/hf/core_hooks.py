"""Hooks around a model without its head: what callers see, what towers get, whether parts stay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import AttachError
from tokenprune.hooks import NotCopyable, Removable
from tokenprune.untraced import untraced

from ..kit.marks import marked
from ..kit.method_wrapper import is_replaced, wrap_method
from .anatomy import Anatomy
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


def encode_untraced(parts: Anatomy) -> Iterator[Removable]:
    """Wrappers that keep what encodes pictures and videos out of `torch.compile`."""
    for name in ("get_image_features", "get_video_features"):
        if hasattr(parts.core, name) and not is_replaced(parts.core, name):
            yield from wrap_method(parts.core, name, lambda call, arguments: call())
