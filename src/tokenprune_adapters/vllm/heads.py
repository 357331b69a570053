"""Signals of all heads, where each process computes some of them.

In tensor parallelism a process has some heads of every layer, and attention of its own heads alone
would rank tokens otherwise than its neighbours do: they would keep other tokens, and the text would
be wrong without any error. So heads are gathered before anything is ranked, and every process reads
the same numbers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tokenprune.signals import Signal

Gather = Callable[[Tensor, int], Tensor]
"""Joins what all processes give on an axis, in the order of their ranks. A collective."""


def gather_heads(found: dict[Signal, Tensor], gather: Gather) -> dict[Signal, Tensor]:
    """Answers to signals with all heads, from those with the heads of this process.

    Args:
        found: answers with the axis `heads` where a signal has one.
        gather: joins tensors of all processes.
    """
    whole: dict[Signal, Tensor] = {}
    # Collectives must come in one order everywhere, which that of a set is not.
    for signal in sorted(found, key=repr):
        names = signal.axes.split()
        answer = found[signal].contiguous()
        whole[signal] = gather(answer, names.index("heads")) if "heads" in names else answer
    return whole
