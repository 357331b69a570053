"""Value carried from a hook before a module to the hook after it, on the tensor that goes in.

Nothing is kept on the module, so calls from several threads, exceptions and checkpointed
recomputation cannot mix up.
"""

from __future__ import annotations

from torch import Tensor

_NAME = "_tokenprune_carried"


def carry(tensor: Tensor, value: object) -> Tensor:
    """Alias of `tensor` that carries `value`.

    >>> import torch
    >>> carried(carry(torch.zeros(2), "which tokens stay"))
    'which tokens stay'
    """
    alias = tensor.view_as(tensor)
    setattr(alias, _NAME, value)
    return alias


def carried(tensor: object) -> object:
    """Value that `tensor` carries, or None."""
    return getattr(tensor, _NAME, None)
