"""T1 to T3: what every tower adapter promises."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ..attach import observe
from ..hooks import Removable
from ..observation import Observation
from ..plugins import registry
from .cases import TowerCase
from .generators import is_attention
from .promises import promise, require
from .snapshot import Interrupted, Snapshot, interrupted_installs, same_output


def _observing(case: TowerCase, tower: nn.Module) -> Any:
    return observe(tower, case.signals, feature_layer=case.feature_layer, adapter=case.adapter)


@promise(TowerCase)
@torch.no_grad()
def check_t1_output_is_unchanged(case: TowerCase) -> None:
    """An observed tower returns what it always does, bit for bit."""
    tower, inputs = case.build(), case.inputs()
    expected = case.run(tower, inputs)
    with _observing(case, tower) as observation:
        for _ in range(2):
            got = case.run(tower, inputs)
            require(same_output(got, expected), f"{case.name} returns something else when observed")
            require(observation.ready, f"{case.name} ran, but nothing was observed")
    after = case.run(tower, inputs)
    require(same_output(after, expected), f"{case.name} returns something else afterwards")


@promise(TowerCase)
@torch.no_grad()
def check_t2_signals_are_those_of_the_tower(case: TowerCase) -> None:
    """Attention rows are in [0, 1] with sums of at most 1, and signals equal their definition."""
    tower, inputs = case.build(), case.inputs()
    features = None if case.features is None else case.features(tower, inputs)
    oracle = case.oracle
    expected = {s: oracle(tower, inputs, s) for s in case.signals} if oracle is not None else {}
    with _observing(case, tower) as observation:
        case.run(tower, inputs)
        tokens, signals = observation.take()
    given, asked = set(signals), set(case.signals)
    require(given >= asked, f"{case.name} did not give {asked - given}")
    if features is not None:
        _close(case, tokens.features, features, "features")
    for signal in case.signals:
        answer, names = signals[signal], signal.axes.split()
        for name, size in zip(("batch", "tokens"), tokens.mask.shape, strict=True):
            if name in names:
                got = answer.shape[names.index(name)]
                require(got == size, f"{case.name}: {signal} has {got} {name}, not {size}")
        require(bool(answer.isfinite().all()), f"{case.name}: {signal} is not finite")
        if is_attention(signal):
            rows = answer.float()
            inside = bool(((rows >= 0) & (rows <= 1)).all())
            require(inside, f"{case.name}: {signal} is outside of [0, 1]")
            most = float(rows.sum(names.index("tokens")).max())
            require(most <= 1 + 1e-4, f"{case.name}: rows of {signal} sum to {most}")
        if signal in expected:
            _close(case, answer, expected[signal], str(signal))


@promise(TowerCase)
@torch.no_grad()
def check_t3_nothing_stays_behind(case: TowerCase) -> None:
    """Hooks are removed and nothing is retained, also after a failed run or installation."""
    tower, inputs = case.build(), case.inputs()
    case.run(tower, inputs)
    before = Snapshot(tower)

    with _observing(case, tower) as observation:
        during = before.differences(hooks=False)
        require(not during, f"{case.name}: observing is more than hooks: {during}")
        case.run(tower, inputs)
        # torch keeps a weak reference of its own kind to a tensor alive for as long as its data.
        held = [ref(observation.tokens), *map(ref, observation.signals.values())]
    watched = ref(observation)
    del observation
    gc.collect()
    kept = [one() for one in held if one() is not None]
    require(watched() is None and not kept, f"{case.name} retains what it observed")
    left = before.differences()
    require(not left, f"{case.name} leaves behind: {left}")

    try:
        with _observing(case, tower):
            raise Interrupted
    except Interrupted:
        pass
    left = before.differences()
    require(not left, f"{case.name} leaves behind after an exception: {left}")

    known = registry()
    adapter = known.claiming(known.towers, tower, case.adapter).adapter()

    def install() -> Iterator[Removable]:
        wanted = frozenset(case.signals)
        return adapter.install(tower, wanted, Observation(), case.feature_layer)

    for count, left in interrupted_installs(install, before):
        require(
            not left, f"{case.name}: an installation that fails after {count} leaves behind: {left}"
        )


def _close(case: TowerCase, got: Tensor, expected: Tensor, what: str) -> None:
    require(
        got.shape == expected.shape,
        f"{case.name}: {what} has the shape {tuple(got.shape)}, not {tuple(expected.shape)}",
    )
    scale = float(expected.abs().max())
    gap = float((got.double() - expected.double()).abs().max())
    require(gap <= 1e-4 * scale, f"{case.name}: {what} is off by {gap}, of {scale}")
