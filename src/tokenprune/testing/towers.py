"""T1 to T6: what every tower adapter promises."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ..attachment import observe
from ..hooks import Removable
from ..observation import Observation
from ..plugins import registry
from ..signals import ClsAttention, Keys, Signal, Signals
from ..tokens import VisualTokens
from .cases import TowerCase
from .generators import is_attention
from .own_maps import own_maps, row_of
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


@promise(TowerCase)
@torch.no_grad()
def check_t4_tokens_stand_for_their_patches(case: TowerCase) -> None:
    """A token stands for the patch in its place: what changes there changes that token first."""
    tower, inputs = case.build(), case.inputs()
    known = registry()
    gives = known.claiming(known.towers, tower, case.adapter).adapter().provides(tower)
    first: list[Signal] = [Keys(layer=0)] if Keys in gives else []
    first += [ClsAttention(layers=(0,))] if ClsAttention in gives else []

    def seen(given: dict[str, Any]) -> tuple[VisualTokens, Signals]:
        with observe(tower, first, feature_layer=0, adapter=case.adapter) as observation:
            case.run(tower, given)
            return observation.take()

    before, rows = seen(inputs)
    count = before.lengths[0]
    off: dict[str, list[int]] = {}
    places = sorted({0, 1, count // 2, count - 1})
    for place in places:
        changed = _elsewhere_painted(case, inputs, place, count)
        if changed is None:
            warnings.warn(
                f"{case.name}: where patches are was not checked (T4): no 4-D input to paint in; "
                "give the case `painted`",
                stacklevel=2,
            )
            return
        after, answers = seen(changed)
        moved = {"features": (after.features - before.features)[0, :count].float().norm(dim=-1)}
        for signal in first:
            if isinstance(signal, Keys):
                gap = answers[signal][0] - rows[signal][0]
                moved[repr(signal)] = gap.float().norm(dim=-1).sum(0)
            else:
                # Beside the patch itself only the sum changes, so logarithms move together.
                logs = answers[signal][0, 0].log() - rows[signal][0, 0].log()
                moved[repr(signal)] = (logs - logs.median(-1, keepdim=True).values).abs().sum(0)
        for what, change in moved.items():
            off.setdefault(what, []).append(int(change.argmax()) - place)
    for what, shifts in off.items():
        wrong = sum(shift != 0 for shift in shifts)
        # In features neighbours mix; the others tell exactly.
        require(
            wrong <= (len(shifts) // 2 if what == "features" else 0),
            f"{case.name}: {what} of patches {places} change most at patches "
            f"{[place + shift for place, shift in zip(places, shifts, strict=True)]}; is [CLS] or "
            "a register taken for a patch?",
        )


@promise(TowerCase)
@torch.no_grad()
def check_t5_rows_are_those_of_its_own_maps(case: TowerCase) -> None:
    """Attention rows equal those of the maps that the tower computes, where torch shows them."""
    tower, inputs = case.build(), case.inputs()
    maps = own_maps(lambda: case.run(tower, inputs))
    with _observing(case, tower) as observation:
        case.run(tower, inputs)
        tokens, signals = observation.take()
    for signal in case.signals:
        expected = row_of(maps, signal, tokens.mask.shape[1], case.feature_layer)
        if case.oracle is None and expected is None:
            warnings.warn(
                f"{case.name}: no oracle for {signal}: only ranges were checked (T2)", stacklevel=2
            )
        if case.oracle is None and expected is not None:
            _close(case, signals[signal], expected, f"{signal}, by the tower's own maps,")


@promise(TowerCase)
@torch.no_grad()
def check_t6_ids_tell_pictures_apart(case: TowerCase) -> None:
    """Equal pictures have equal ids, others have others, whatever else is in the batch."""
    tower, inputs = case.build(), case.inputs()

    def ids(*order: int) -> list[int]:
        batch = {name: _rows(value, list(order)) for name, value in inputs.items()}
        with _observing(case, tower) as observation:
            case.run(tower, batch)
            found: list[int] = observation.tokens.ids.tolist()
            return found

    with _observing(case, tower) as observation:
        case.run(tower, inputs)
        own: list[int] = observation.tokens.ids.tolist()
    if len(own) < 3 or any(len(value) != len(own) for value in inputs.values()):
        warnings.warn(
            f"{case.name}: ids were not checked (T6): the inputs are no three pictures in rows",
            stacklevel=2,
        )
        return
    require(
        len(set(own)) == len(own),
        f"{case.name}: different pictures have the ids {own}; `random` would keep the same of all. "
        "Give VisualTokens.of(..., ids=ids_of(pixels)), of tokenprune_adapters.kit.fingerprint",
    )
    got, expected = ids(2, 0, 0), [own[2], own[0], own[0]]
    require(
        got == expected,
        f"{case.name}: pictures with the ids {expected} have {got} in another batch",
    )


def _rows(value: Any, order: list[int]) -> Any:
    return value[torch.tensor(order)] if isinstance(value, Tensor) else [value[n] for n in order]


def _elsewhere_painted(
    case: TowerCase, inputs: dict[str, Any], place: int, count: int
) -> dict[str, Any] | None:
    """Inputs whose first picture has noise at the patch of a token, or None: nobody can tell."""
    if case.painted is not None:
        return case.painted(inputs, place)
    name = next((n for n, x in inputs.items() if isinstance(x, Tensor) and x.ndim == 4), None)
    if name is None:
        return None
    pixels: Tensor = inputs[name].clone()
    height, width = pixels.shape[2:]
    rows = [n for n in range(1, count + 1) if count % n == 0 and n * width == count // n * height]
    require(
        bool(rows),
        f"{case.name}: {count} visual tokens make no grid on pictures of {height} x {width}; are "
        "[CLS] or registers among them?",
    )
    high, wide = height // rows[0], width * rows[0] // count
    top, left = place // (count // rows[0]) * high, place % (count // rows[0]) * wide
    noise = torch.rand(pixels.shape[1], high, wide, generator=torch.Generator().manual_seed(place))
    pixels[0, :, top : top + high, left : left + wide] += 3 * noise.to(pixels) - 1
    return {**inputs, name: pixels}


def _close(case: TowerCase, got: Tensor, expected: Tensor, what: str) -> None:
    require(
        got.shape == expected.shape,
        f"{case.name}: {what} has the shape {tuple(got.shape)}, not {tuple(expected.shape)}",
    )
    scale = float(expected.abs().max())
    gap = _gap(got, expected)
    require(
        gap <= 1e-4 * scale,
        f"{case.name}: {what} is off by {gap}, of {scale}{_likely(got, expected, 1e-4 * scale)}",
    )


def _gap(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).abs().max())


def _likely(got: Tensor, expected: Tensor, slack: float) -> str:
    """What `got` is instead, if that can be said."""
    got, expected = got.double(), expected.double()
    for axis in range(1, got.ndim):
        for step, words in ((1, "shifted by one"), (-1, "shifted back by one")):
            if got.shape[axis] > 2:
                inner = slice(1, None) if step == 1 else slice(None, -1)
                here = torch.arange(got.shape[axis])[inner]
                moved = expected.roll(step, axis).index_select(axis, here)
                if _gap(got.index_select(axis, here), moved) <= slack:
                    return f": it equals the oracle {words} along axis {axis}"
        if got.shape[axis] > 1 and _gap(got, expected.flip(axis)) <= slack:
            return f": it equals the oracle backwards along axis {axis}"
    ratio = got / expected.clamp(min=1e-12)
    if bool(((ratio - ratio.median()).abs() < 1e-3 * ratio.median().abs()).all()):
        return f": it is {float(ratio.median()):.4g} times the oracle"
    if bool((got > 0).all() & (expected > 0).all()):
        logs, of = got.log().diff(dim=-1), expected.log().diff(dim=-1)
        powers = (logs / of)[of.abs() > 1e-3]
        if powers.numel() and float((powers - powers.median()).abs().max()) < 1e-2:
            return (
                f": its logits are {float(powers.median()):.4g} times the oracle's; is the scale "
                "of the attention left out?"
            )
    return ""
