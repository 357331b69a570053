"""Heads of an attention that are split between processes (tensor parallel): refused where read.

A process would rank tokens by its own heads alone, another than its neighbours, and keep others.
"""

from __future__ import annotations

from torch import Tensor, distributed, nn

from tokenprune.errors import UnsupportedError


def refuse_split(what: str, there: int, whole: int) -> None:
    """Refuse to read an attention of which a process computes a part.

    Args:
        what: name of the attention.
        there: heads, or channels of all heads, in this process.
        whole: the same in all of them.

    Raises:
        UnsupportedError: there are less than that, and there are several processes.
    """
    if there < whole and distributed.is_available() and distributed.is_initialized():
        raise UnsupportedError(
            f"{what} computes {there} of {whole} in each process (tensor parallel), so each would "
            "rank tokens by other heads and keep others; rank by features (tome, divprune, "
            "similarity) or not at all (uniform, random), or serve with vLLM, where heads are "
            "gathered"
        )


def refuse_split_channels(projection: nn.Module, output: Tensor) -> None:
    """Refuse a projection to queries or keys of which a process computes some channels."""
    whole = getattr(projection, "out_features", output.shape[-1])
    refuse_split(type(projection).__name__, output.shape[-1], whole)
