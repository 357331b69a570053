"""Wrappers that other libraries put around a model, and how to see through them."""

from __future__ import annotations

from typing import Any

from torch import nn

from .errors import UnsupportedError


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of wrappers that leave its modules as they are.

    Sees through PEFT's models (LoRA and other adapters that live in the layers), through
    `DistributedDataParallel`, and through what `torch.compile` returns.

    Raises:
        UnsupportedError: a wrapper that changes the prompt behind our back (PEFT's prompt tuning),
            or copies the model in every call (`DataParallel`).
    """
    inner: Any = model
    while True:
        names = [f"{c.__module__.partition('.')[0]}.{c.__name__}" for c in type(inner).__mro__]
        if "peft.PeftModel" in names:
            if inner.active_peft_config.is_prompt_learning:
                raise UnsupportedError(
                    f"{type(inner.active_peft_config).__name__} puts virtual tokens in front of "
                    "the prompt, where visual tokens would be looked for in the wrong places; "
                    "adapters inside the layers (LoRA, IA3, ...) work"
                )
            inner = inner.get_base_model()
        elif "torch.DistributedDataParallel" in names:
            inner = inner.module
        elif "torch.OptimizedModule" in names:
            inner = inner._orig_mod
        elif "torch.DataParallel" in names:
            raise UnsupportedError(
                "DataParallel copies the model in every call, hooks and all; attach to "
                "`model.module` in one process per device (DistributedDataParallel) instead"
            )
        else:
            found: nn.Module = inner
            return found
