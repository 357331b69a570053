"""Hooks before decoder layers: they open segments, and hand each layer what its segment needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from tokenprune.hooks import NotCopyable, Removable

from ..names import Call, Hooked, calls_of
from .inner_stages import ReduceInside
from .position_planes import of_text, rotated
from .run import RUN, Run


def install_between(inside: ReduceInside) -> Iterator[Removable]:
    """Yield the handles of hooks by which `inside` acts."""
    for number, layer in enumerate(inside.llm.layers):
        hook = BeforeLayer(inside, number)
        yield layer.register_forward_pre_hook(hook.before, with_kwargs=True)
    for reading in inside.reading.values():
        yield from reading.install()


class BeforeLayer(NotCopyable):
    """Hook before one decoder layer."""

    def __init__(self, inside: ReduceInside, number: int) -> None:
        self.inside = inside
        self.number = number
        self.reading = inside.reading.get(number)
        self.calls = calls_of(inside.llm.layers[number])

    def before(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Hooked | None:
        run: Run | None = kwargs.pop(RUN, None)
        reading, number = self.reading, self.number
        if reading is not None:
            reading.ask(None)
        if run is None:
            return None  # which costs less than the same arguments
        plain = not run.flash and run.deepstack is None
        if reading is None and number not in self.inside.stages and plain:
            start = run.start_of(number)
            if start == 0:
                return args, kwargs
            if start in run.given:  # by the first layer of the segment
                kwargs.update(run.given[start])
                return args, kwargs
        call = self.calls(args, kwargs)
        hidden = call.hidden
        if run.deepstack is not None:
            hidden = run.deepstack.added(hidden, number - 1)
        # Recomputation under gradient checkpointing comes by again, when all is decided.
        if number in self.inside.stages and number not in run.segments:
            self.inside.open_segment(run, number, hidden)
        start = run.start_of(number)
        segment = run.segments[start]
        if number == start > 0:
            if number in run.merges:
                seats, plan = run.merges[number]
                hidden = seats.merge(hidden, plan)
            if segment.layout is not None:
                hidden = segment.layout.shorten(hidden)
        if reading is not None:
            reading.ask(self.inside.reader(run, number))
        if start > 0:
            if start not in run.rotary:
                rotary = self.inside.llm.rotary_emb
                run.rotary[start] = rotary(hidden, rotated(segment.positions))
            call.rotary = run.rotary[start]
            call.positions = of_text(segment.positions)
            call.mask = segment.mask
            names = [call.find(each.names)[0] for each in (Call.rotary, Call.positions, Call.mask)]
            given = {name: call.kwargs[name] for name in names if name is not None}
            if len(given) == len(names):
                run.given[start] = given
        if run.flash:
            # The rotary embedding is made; flash would take gaps for seams of packed sequences.
            call.positions = segment.counted
        call.hidden = hidden
        return call.args, call.kwargs
