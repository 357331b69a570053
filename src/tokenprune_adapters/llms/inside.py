"""Stages inside a language model: layers from a stage on compute and cache kept tokens only.

Every decoder layer gets a hook before it. Where a stage starts, the hook scores, decides, takes
slots out of the hidden states and opens a new segment; in all later layers it replaces the mask,
positions and rotary embedding, which the model has made for the first segment, by their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from einops import einsum
from torch import Tensor, nn

from tokenprune.adapter import NotCopyable, Removable
from tokenprune.errors import UnsupportedError
from tokenprune.placement import AfterLayer
from tokenprune.plan import Plan
from tokenprune.report import Record
from tokenprune.signals import LastQueryAttention, Signal, Signals, TextQueryAttention
from tokenprune.strategy import Stage
from tokenprune.tokens import VisualTokens

from ..layout import Layout
from .attention import check_layer, query_rows
from .cache import Shortened, state_of
from .images import Images
from .segment import Segment, Slots, enter
from .shorten import RUN, Run
from .store import SignalStore

QueryAttention = LastQueryAttention | TextQueryAttention


class ReduceInside(NotCopyable):
    """The hooks before the decoder layers of a language model.

    Args:
        llm: the language model.
        stages: at `AfterLayer` placements, by the number of the layer that they start at.
        store: where signals of the vision tower are found.
        record: where to note what was done.
    """

    def __init__(
        self, llm: Any, stages: dict[int, Stage], store: SignalStore, record: Record
    ) -> None:
        self.llm = llm
        self.stages = stages
        self.store = store
        self.record = record
        self.watched = {
            layer
            for start, stage in stages.items()
            for signal in stage.strategy.signals
            if isinstance(signal, QueryAttention)
            for layer in self._layers(signal, start)
        }
        for layer in self.watched:
            check_layer(self.llm.layers[layer])
        if not hasattr(self.llm, "rotary_emb"):
            raise UnsupportedError(f"{type(llm).__name__} has no rotary_emb for kept tokens")

    def install(self) -> Iterator[Removable]:
        """Yield the handles."""
        for number, layer in enumerate(self.llm.layers):
            hook = _BeforeLayer(self, number)
            yield layer.register_forward_pre_hook(hook.before, with_kwargs=True)

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

    def open_segment(self, run: Run, start: int, hidden: Tensor, rotary: Any) -> None:
        """Score, decide, and let `run` know the segment that starts at layer `start`."""
        previous = run.segment_of(start)
        images: Images = run.images
        stage = self.stages[start]
        index, mask = images.slots()
        if index.shape[1] == 0:  # an earlier stage has withdrawn them all
            run.segments[start] = replace(previous, layout=None)
            return
        with self.record.selecting(hidden.device):
            tokens = VisualTokens.of(
                _take(hidden, index),
                mask=mask,
                positions=_take(images.place, index).masked_fill(~mask, 0),
                ids=images.prints,
            )
            signals = self._signals(run, start, stage, images, index, rotary)
            reduction = stage.strategy(tokens, signals)
        since = max(first for first in run.segments if first < start)
        self.record.reduced(reduction, tokens.lengths, layer=start, since=since)
        plan = reduction.plan
        cached = run.cache is not None
        fresh = Shortened(
            0,
            run.segments[0].before.valid,
            previous.before.moved.new_zeros(hidden.shape[0]),
            0,
        )
        state = state_of(run.cache, start) or fresh
        place = previous.place + (previous.before.moved - state.moved)[:, None]
        drop = None
        if plan.weights is not None or plan.lengths != tokens.lengths:
            drop = _dropped(hidden, index, mask, plan)
        assert isinstance(stage.placement, AfterLayer)
        slots = Slots(drop, previous.real, place)
        segment = enter(slots, state, run.past, stage.placement.positions, self.llm, cached)
        run.segments[start] = replace(segment, after=_behind(previous, segment.after))
        if plan.weights is not None:
            run.merges[start] = (index, mask, plan)
        if segment.layout is not None:
            run.images = images.through(segment.layout)

    def _signals(
        self,
        run: Run,
        start: int,
        stage: Stage,
        images: Images,
        index: Tensor,
        rotary: Any,
    ) -> Signals:
        asked = stage.strategy.signals
        inside = {signal for signal in asked if isinstance(signal, QueryAttention)}
        outside: frozenset[Signal] = asked - inside
        answers = self.store.get(images.prints, outside, index.shape[1]) if outside else {}
        segment = run.segment_of(start)
        for signal in inside:
            rows = [
                _attention_to_images(
                    self.llm.layers[layer],
                    run.inputs[layer],
                    rotary,
                    segment,
                    images,
                    index,
                    run.cache.layers[layer].keys if run.cache is not None else None,
                    every_text_token=isinstance(signal, TextQueryAttention),
                )
                for layer in self._layers(signal, start)
            ]
            answers[signal] = torch.stack(rows, dim=1)
        return Signals(answers)


class _BeforeLayer(NotCopyable):
    """The hook before one decoder layer."""

    def __init__(self, inside: ReduceInside, number: int) -> None:
        self.inside = inside
        self.number = number

    def before(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        run: Run | None = kwargs.pop(RUN, None)
        if run is None:
            return args, kwargs
        hidden: Tensor = args[0]
        number = self.number
        rotary = run.rotary.get(max(run.segments), kwargs["position_embeddings"])
        # Recomputation under gradient checkpointing comes by again, when all is decided.
        if number in self.inside.stages and number not in run.segments:
            self.inside.open_segment(run, number, hidden, rotary)
        segment = run.segment_of(number)
        if number in run.segments and number > 0:
            if number in run.merges:
                hidden = _merge(hidden, *run.merges[number])
            if segment.layout is not None:
                hidden = segment.layout.shorten(hidden)
        if number in self.inside.watched:
            run.inputs[number] = hidden
        start = max(start for start in run.segments if start <= number)
        if start > 0:
            if start not in run.rotary:
                run.rotary[start] = self.inside.llm.rotary_emb(hidden, position_ids=segment.place)
            kwargs["position_embeddings"] = run.rotary[start]
            kwargs["position_ids"] = segment.place
            kwargs["attention_mask"] = segment.mask
        if "flash" in self.inside.llm.config._attn_implementation:
            # The rotary embedding is made; flash would take gaps for seams of packed sequences.
            kwargs["position_ids"] = None
        return (hidden, *args[1:]), kwargs


def _behind(previous: Segment, after: Shortened) -> Shortened:
    """`after`, and what the segment before has left out and moved in this very pass."""
    return replace(
        after,
        offset=after.offset + previous.after.offset - previous.before.offset,
        moved=after.moved + previous.after.moved - previous.before.moved,
        tail=min(after.tail, previous.after.tail),
    )


def _take(x: Tensor, index: Tensor) -> Tensor:
    """`(batch, slots, ...)` at `(images, tokens)` indices into `batch * slots`."""
    rows = x.flatten(0, 1).index_select(0, index.flatten())
    return rows.reshape(*index.shape, *x.shape[2:])


def _dropped(hidden: Tensor, index: Tensor, mask: Tensor, plan: Plan) -> Tensor:
    """`(batch, slots)` bool: tokens of the images at `index` that are no anchor of `plan`."""
    batch, slots = hidden.shape[:2]
    spare = batch * slots
    drop = torch.zeros(spare + 1, dtype=torch.bool, device=hidden.device)
    drop[index.masked_fill(~mask, spare).flatten()] = True
    drop[index.gather(1, plan.anchors).masked_fill(~plan.mask, spare).flatten()] = False
    return drop[:spare].reshape(batch, slots)


def _merge(hidden: Tensor, index: Tensor, mask: Tensor, plan: Plan) -> Tensor:
    """`hidden` with every anchor replaced by what the plan makes of its group."""
    spare = hidden.shape[0] * hidden.shape[1]
    flat = torch.cat([hidden.flatten(0, 1), hidden.new_zeros(1, hidden.shape[2])])
    target = index.gather(1, plan.anchors).masked_fill(~plan.mask, spare)
    merged = plan(_take(hidden, index).masked_fill(~mask[:, :, None], 0))
    flat = flat.index_copy(0, target.flatten(), merged.flatten(0, 1))
    return flat[:spare].reshape(hidden.shape)


def _attention_to_images(
    layer: nn.Module,
    hidden: Tensor,
    rotary: Any,
    segment: Segment,
    images: Images,
    index: Tensor,
    cached: Tensor | None,
    every_text_token: bool,
) -> Tensor:
    """`(images, heads, tokens)`: attention of the text to each image's tokens.

    Of the last real token of the prompt, or the mean over all text tokens after the image.
    """
    slots = hidden.shape[1]
    real = segment.real
    if real is None:
        real = torch.ones_like(segment.place, dtype=torch.bool)
    numbers = torch.arange(slots, device=hidden.device)
    last = torch.where(real, numbers, -1).amax(1).clamp(min=0)
    if every_text_token:
        behind = (images.number >= 0).cumsum(1) > 0
        asking = real & behind & (images.number < 0)
        asking |= numbers == last[:, None]
        queries = Layout.of(asking)
        index_of, known = queries.index, queries.valid
    else:
        index_of, known = last[:, None], None
    rows = query_rows(layer, hidden, rotary, index_of, segment.after.valid, cached)
    row = index[:, 0] // slots
    weight = torch.ones(index.shape[0], index_of.shape[1], device=hidden.device)
    if every_text_token:
        end = (index % slots).amax(1)
        weight = (index_of[row] > end[:, None]).float()
        weight = weight if known is None else weight * known[row]
        # An image that ends its prompt is asked about by the last token alone.
        alone = weight.sum(1, keepdim=True) == 0
        weight = torch.where(alone, (index_of == last[:, None])[row].float(), weight)
        weight = weight / weight.sum(1, keepdim=True)
    mean = einsum(rows[row], weight, "i heads q keys, i q -> i heads keys")
    columns = index % slots + rows.shape[-1] - slots
    return mean.gather(2, columns[:, None, :].expand(-1, mean.shape[1], -1))
