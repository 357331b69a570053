"""Stages inside a language model: layers from a stage on compute and cache kept tokens only.

Every decoder layer gets a hook before it. Where a stage starts, the hook scores, decides, takes
slots out of the hidden states and opens a new segment; in all later layers it replaces the mask,
positions and rotary embedding, which the model has made for the first segment, by their own.

Prefill of a prompt of S slots, of which a stage at layer 2 of 4 keeps S':

    layer 0   layer 1   layer 2    layer 3
    |-- segment 0: S --||-- segment 2: S' --|

Only the pass that holds an image decides. Later passes (decoding) find in the cache how each
segment was shortened.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import UnsupportedError
from tokenprune.hooks import NotCopyable
from tokenprune.placement import AfterLayer
from tokenprune.plan import Plan
from tokenprune.report import Record
from tokenprune.signals import LastQueryAttention, Signal, Signals, TextQueryAttention
from tokenprune.strategy import Reduction, Stage
from tokenprune.tokens import VisualTokens
from tokenprune.untraced import untraced

from ...kit.before_projector import Ids, Sizes
from ..attention import ReadAttention, Reader
from .cache_layers import Shortened
from .image_slots import Images, Seats
from .kv_cache import difference, make_room, moved_down, state_of, total
from .run import Run
from .segment import Segment, Slots, enter
from .signal_cache import SignalCache, fitted, refuse_unknown
from .text_attention import Prompts, last_rows, text_rows

QueryAttention = LastQueryAttention | TextQueryAttention


class ReduceInside(NotCopyable):
    """Decisions between the decoder layers of a language model, for the hooks of `layer_hooks.py`.

    Args:
        llm: the language model.
        stages: at `AfterLayer` placements, by the number of the layer that they start at.
        store: where signals of the vision tower are found.
        record: where to note what was done.
    """

    def __init__(
        self, llm: Any, stages: dict[int, Stage], store: SignalCache, record: Record
    ) -> None:
        self.llm = llm
        self.stages = stages
        self.store = store
        self.record = record
        self.watched: dict[int, set[tuple[int, type[Signal]]]] = {}
        for start, stage in stages.items():
            for signal in stage.strategy.signals:
                if isinstance(signal, QueryAttention):
                    for layer in self._layers(signal, start):
                        self.watched.setdefault(layer, set()).add((start, type(signal)))
        self.reading = {layer: ReadAttention(llm.layers[layer]) for layer in self.watched}

    def _layers(self, signal: QueryAttention, start: int) -> tuple[int, ...]:
        """Absolute layers of `signal`: -1 is the latest that has run before `start`."""
        earliest = max((other for other in self.stages if other < start), default=0)
        layers = tuple(start + layer if layer < 0 else layer for layer in signal.layers)
        if not all(earliest <= layer < start for layer in layers):
            raise UnsupportedError(
                f"{signal} at after-layer({start}) must name layers that have run on the same "
                f"tokens: {earliest - start} to -1, or {earliest} to {start - 1}"
            )
        return layers

    @untraced
    @torch.no_grad()
    def open_segment(self, run: Run, start: int, hidden: Tensor) -> None:
        """Score, decide, and let `run` know the segment that starts at layer `start`.

        A decision takes no part in autograd, like all signals; what it does to `hidden` does.
        """
        with self.record.selecting(hidden.device):
            self._open(run, start, hidden)

    def _open(self, run: Run, start: int, hidden: Tensor) -> None:
        previous = run.segment_of(start)
        images = run.images
        assert images is not None
        seats = self._seats(run, images)
        if not run.counts:
            prints, rows = images.known
            run.counts[0] = images.left
            run.known = self.store.get(prints, hidden.device)
            run.origins = self.store.originals(images, prints, rows)
        if seats.index.shape[1] == 0:  # an earlier stage has withdrawn them all
            run.counts[start] = (0,) * len(images.slots)
            run.segments[start] = self._segment(run, start, previous, None)
            return
        reduction = self._decide(run, images, start, hidden, seats)
        run.rows.clear()
        run.seats = None
        plan = reduction.plan
        self.record.decided(reduction, run.origins)
        run.counts[start] = plan.lengths
        merges, drop = plan.members is not None, None
        if merges:
            run.merges[start] = seats, plan
        if merges or not _keeps_all(plan, run.counts):
            drop = seats.dropped(plan)
            if 0 in plan.lengths:
                previous.check_left(drop, self.stages[start])
        segment = run.segments[start] = self._segment(run, start, previous, drop)
        if segment.layout is not None:
            left = images.through(segment.layout)
            run.images = replace(left, left=plan.lengths)
            if run.deepstack is not None:
                run.deepstack = run.deepstack.through(segment.layout)

    def _decide(
        self, run: Run, images: Images, start: int, hidden: Tensor, seats: Seats
    ) -> Reduction:
        """Run the stage's strategy on the tokens of all images in the batch."""
        strategy = self.stages[start].strategy
        assert run.known is not None
        known = dict(fitted(run.known, seats.index.shape[1]))
        tokens = VisualTokens.of(
            seats.take(hidden),
            mask=seats.mask,
            lengths=seats.lengths,
            patches=seats.take(images.patch),
            sizes=known.get(Sizes()),
            ids=known.get(Ids(), images.prints),
        )
        of_tower = (each for each in strategy.signals if not isinstance(each, QueryAttention))
        refuse_unknown(of_tower, known)
        self._read(run, images)
        rows = self._rows(run, start)
        reduction = strategy(tokens, Signals({**known, **rows}))
        # Later stages find what is left, without gaps and padded to the longest.
        compact = reduction.plan.then(Plan.select(reduction.plan.mask, reduction.plan.lengths))
        sizes = tokens.reduce(compact).sizes
        run.known = Signals({**Signals(known).reduce(compact), Sizes(): sizes})
        return reduction

    def _rows(self, run: Run, start: int) -> dict[Signal, Tensor]:
        """What the stage at `start` asks of the layers before it."""
        rows: dict[Signal, Tensor] = {}
        for signal in self.stages[start].strategy.signals:
            if not isinstance(signal, QueryAttention):
                continue
            wanted = [(type(signal), layer) for layer in self._layers(signal, start)]
            missing = [layer for kind, layer in wanted if (kind, layer) not in run.rows]
            if missing:
                raise UnsupportedError(
                    f"attention rows of {type(self.llm.layers[missing[0]]).__name__} cannot be "
                    "read: its attention has not called its attention function; rank by "
                    "cls-attention, or before the LLM"
                )
            rows[signal] = torch.stack([run.rows[each] for each in wanted], dim=1)
        return rows

    def reader(self, run: Run, number: int) -> Reader | None:
        """Keeper of queries and keys of layer `number` for stages yet to decide, or None."""
        images = run.images
        kinds = {kind for start, kind in self.watched.get(number, ()) if start not in run.segments}
        if images is None or not kinds:
            return None
        return partial(run.asked.__setitem__, number)

    def _read(self, run: Run, images: Images) -> None:
        """Attention rows of the layers whose queries and keys have been kept."""
        seats = self._seats(run, images)
        for number, asked in run.asked.items():
            segment = run.segment_of(number)
            real = segment.real
            if real is None:
                shape = segment.positions.shape[:2]
                real = torch.ones(shape, dtype=torch.bool, device=segment.positions.device)
            # Static layers hand back slots that are yet to be filled.
            keys = int(run.whole.past + run.whole.slots - segment.after.offset)
            asked = replace(asked, key=asked.key[:, :, :keys])
            valid = segment.after.valid
            valid = None if valid is None else valid[:, :keys]
            prompts = Prompts(real, valid, segment.sample)
            for kind in {kind for _, kind in self.watched[number]}:
                run.rows[kind, number] = (
                    last_rows(asked, prompts, seats.row, seats.column)
                    if kind is LastQueryAttention
                    else text_rows(asked, prompts, images, seats)
                )
        run.asked.clear()

    def _seats(self, run: Run, images: Images) -> Seats:
        """Where the visual tokens of the latest segment sit; one sync for each segment."""
        if run.seats is None:
            run.seats = images.seats()
        return run.seats

    def _segment(self, run: Run, start: int, previous: Segment, drop: Tensor | None) -> Segment:
        """The segment from `start` on, which computes what `previous` does without `drop`."""
        state = state_of(run.whole.cache, start)
        if state is None:
            state = Shortened(0, run.segments[0].before.valid, None, 0)
        # Where earlier prompts of the cache were shortened, positions have moved by segments.
        back = difference(state.moved, previous.before.moved)
        positions = moved_down(previous.positions, back)
        placement = self.stages[start].placement
        assert isinstance(placement, AfterLayer)
        slots = Slots(drop, previous.real, positions, previous.sample)
        segment = enter(slots, state, run.whole, placement.positions, start)
        make_room(run.whole.cache, start, segment.after.offset)
        # What earlier segments have moved in this very pass is moved here, too.
        moved = difference(previous.after.moved, previous.before.moved)
        after = replace(
            segment.after,
            moved=total(segment.after.moved, moved),
        )
        return replace(segment, after=after)


def _keeps_all(plan: Plan, counts: dict[int, tuple[int, ...]]) -> bool:
    """Whether `plan`, the latest of `counts`, keeps what the stage before has left."""
    *_, before, after = counts.values()
    return before == after
