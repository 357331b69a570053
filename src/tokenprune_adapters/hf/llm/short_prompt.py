"""Short prompt: a language model computes it, while its caller sees the whole one.

The hook before the model takes marked (dropped) slots and padding out of the embeddings, masks and
position ids; the hook after it tells the cache, and puts hidden states back to logical length, so
that logits, labels, `logits_to_keep` and `generate` need not know. Stages inside the model are the
business of `inner_stages.py`, whose hooks work on the `Run` that is made here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import UnsupportedError
from tokenprune.hooks import NotCopyable, Removable
from tokenprune.placement import Positions
from tokenprune.report import Record
from tokenprune.untraced import untraced

from ...kit.carry import carried, carry
from ...kit.marks import marked
from ...kit.prompt_layout import PromptLayout
from ..anatomy import ATTENTION, RECURRENT, attention_of, has_states
from ..names import Call, Hooked, calls_of
from ..outputs import Output
from .cache_layers import Shortened
from .deepstack import DeepStack
from .image_slots import Images
from .kv_cache import (
    check_cache,
    check_starts,
    expect_update,
    fixed_alike,
    make_room,
    moved_down,
    note,
    state_of,
    stored_bytes,
)
from .padding import Padding, are_seams, length_of, no_images, positions_of, steps_of
from .position_planes import outwards
from .run import IMAGES, RUN, TEXT, VISUAL, Run
from .segment import Pass, Slots, enter


class ShortenPrompts(NotCopyable):
    """Pair of hooks on a language model.

    Args:
        llm: the language model.
        positions: ``"reindexed"`` counts the kept tokens anew, ``"original"`` leaves gaps.
        record: where KV bytes are noted.
        starts: layers at which stages inside the model reduce further; see `inner_stages.py`.
        to_layers: whether the layers have hooks that want the `Run`.
        settle: function from int64 numbers to a list of them, by a host sync.
        planes: whether position ids have a time, a row and a column (M-RoPE).
    """

    def __init__(
        self,
        llm: nn.Module,
        positions: Positions,
        record: Record,
        starts: tuple[int, ...] = (),
        to_layers: bool = False,
        settle: Callable[[Tensor], list[int]] = Tensor.tolist,
        planes: bool = False,
    ) -> None:
        self.llm = llm
        self.calls = calls_of(llm)
        self.positions = positions
        self.record = record
        self.starts = starts
        self.to_layers = to_layers
        self.settle = settle
        self.planes = planes
        self.states = has_states(llm)

    def install(self) -> Iterator[Removable]:
        """Yield the handles."""
        yield self.llm.register_forward_pre_hook(self.before, with_kwargs=True)
        yield self.llm.register_forward_hook(self.after, with_kwargs=True)

    def before(
        self, llm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        text: bool = kwargs.pop(TEXT, False)
        find: Callable[[], Images | None] = kwargs.pop(IMAGES, no_images)
        visual: Tensor | None = kwargs.pop(VISUAL, None)
        call = self.calls(args, kwargs)
        if call.embeds is None:
            return None
        if not text:
            hooked: Hooked = self._begin(call, find, visual)
            return hooked
        # The model has made all embeddings from ids: there is nothing to look for.
        if state_of(call.cache) is None:
            return call.hooked
        return self._go_on(call)

    @untraced
    def _begin(
        self, call: Call, find: Callable[[], Images | None], visual: Tensor | None
    ) -> Hooked:
        """Look for marks and images, and enter what is left of the prompt; one sync."""
        embeds: Any = call.embeds
        drop, images = marked(embeds), find()
        padding = Padding.of(call.mask, int(length_of(call.cache)), embeds)
        real = padding.real(embeds)
        seen = drop[:, :0] if images is None else images.among(real).visual
        images = None if images is None else images.among(real & ~drop).printed(embeds)
        hidden = drop[:, :0] if visual is None else visual & ~real & ~drop
        steps = steps_of(self.llm, call, drop.shape)
        seams = real.new_zeros(()) if steps is None else steps[:, -1].any()
        odd = seams.new_zeros(()) if padding.odd is None else padding.odd
        flags = torch.stack([drop.any(), seen.any(), hidden.any(), real.all(), seams, odd]).long()
        asked = [flags, PromptLayout.facts(real & ~drop)]
        if images is not None:
            asked.append(images.facts())
        shorten, some_visual, wasted, all_real, gaps, more, *facts = self.settle(torch.cat(asked))
        images = None if images is None else images.told(facts[3:])
        if shorten or (self.starts and images is not None):
            padding.check_odd(more)
        if not (shorten or (self.starts and some_visual)) and state_of(call.cache) is None:
            return call.hooked
        if shorten and wasted:
            raise UnsupportedError(
                "attention_mask hides visual tokens that were kept before the LLM, so budget was "
                "spent on what nobody sees; leave the picture out of the prompt, or reduce after a "
                "layer, where hidden tokens are not counted"
            )
        if shorten and self.starts and images is None:
            raise UnsupportedError(
                "the language model got reduced image features, but not from the attached model, "
                "so stages after a layer cannot know the images; call the whole model"
            )
        shown = images if some_visual else None
        dropped = drop if shorten else None
        found = _Seen(dropped, shown, bool(all_real), bool(gaps), steps, facts[:3])
        return self._enter(call, padding, found)

    def _go_on(self, call: Call) -> Hooked:
        """Enter a pass without images."""
        embeds: Any = call.embeds
        past, tracing = length_of(call.cache), torch.compiler.is_compiling()
        if embeds.shape[1] > 1 and not tracing:
            past = int(past)
        padding = Padding.of(call.mask, past, embeds)
        steps = steps_of(self.llm, call, padding.shape)
        seen = _Seen(None, None, padding.columns is None, False, steps)
        # Whoever traces waits for no value: a mask that hides nothing is as good as none.
        if not tracing and not (seen.all_real and steps is None):
            real = padding.real(embeds).all()
            none = real.new_zeros(())
            seams = none if steps is None else steps[:, -1].any()
            odd = none if padding.odd is None else padding.odd
            all_real, gaps, more = torch.stack([real, seams, odd]).tolist()
            padding.check_odd(more)
            seen = _Seen(None, None, all_real, gaps, steps)
        return self._enter(call, padding, seen)

    def _enter(self, call: Call, padding: Padding, seen: _Seen) -> Hooked:
        """Let a pass compute what is left, and its stages know.

        Args:
            call: call of the language model.
            padding: what its mask tells.
            seen: what was found in it.
        """
        llm, cache, starts = self.llm, call.cache, self.starts
        embeds: Any = call.embeds
        padding.check()
        if call.flash_seams is not None:
            raise UnsupportedError(
                "cu_seq_lens tell where conversations of the unshortened prompt end; leave them "
                "out, and position_ids that start anew at each conversation will tell"
            )
        check_cache(cache)
        check_starts(cache, starts)
        images = seen.images
        fresh = Shortened(0, padding.real_past, None, 0)
        known = state_of(cache, 0) or fresh
        positions = positions_of(call.positions, padding.past, embeds, self.planes)
        whole = Pass(llm, cache, padding.past, padding.shape[1])
        sample = seen.steps if seen.gaps and are_seams(llm, call, seen.all_real) else None
        columns_real = None if seen.all_real else padding.real(embeds)
        placed = moved_down(positions, known.moved)
        slots = Slots(seen.drop, columns_real, placed, sample, seen.gaps, seen.facts)
        first = enter(slots, known, whole, self.positions, 0)
        make_room(cache, 0, first.after.offset)
        run = Run(whole, {0: first}, flash="flash" in attention_of(llm))
        if starts and images is not None:
            run.images = images if first.layout is None else images.through(first.layout)
        else:
            for start in starts:
                state = state_of(cache, start) or fresh
                same = Slots(None, slots.real, moved_down(positions, state.moved), sample)
                run.segments[start] = enter(same, state, whole, "original", start)
        layers: Any = llm.layers
        stack = DeepStack.taken(call, len(layers))
        run.deepstack = None if stack is None else stack.through(first.layout)
        if first.layout is not None:
            embeds = first.layout.shorten(embeds)
        call.embeds = carry(embeds, run)
        call.positions = outwards(first.positions)
        call.mask = first.mask
        if self.states:
            call.mask = {ATTENTION: first.mask, RECURRENT: first.real}
        if self.to_layers and run.concerns_layers:
            call.kwargs[RUN] = run
        expect_update(cache)
        return call.hooked

    def after(
        self, llm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        embeds = self.calls(args, kwargs).embeds
        if embeds is None:
            return None
        run = carried(embeds)
        if not isinstance(run, Run):
            # Nothing was reduced: a prefill has a cache all the same, if its output says so.
            if not isinstance(output, (tuple, list)):
                cache = Output(output).cache
                # Of static caches the length is a tensor, which a decoding step does not wait for.
                length = 0 if cache is None else cache.get_seq_length()
                if embeds.shape[1] > 1 or (isinstance(length, int) and length <= 1):
                    self._count(cache)
            return None
        cache = Output(output).cache
        shortened = any(segment.layout is not None for segment in run.segments.values())
        # A batch may be as long as it was, and yet its rows sit at other slots: the longest prompt
        # may have lost nothing.
        if cache is not None and (shortened or state_of(cache) is not None):
            check_cache(cache)
            states = {start: segment.after for start, segment in run.segments.items()}
            if shortened:  # a decode step leaves the states as they are
                states = fixed_alike(states, int(run.whole.past + run.whole.slots))
            note(cache, states)
        if shortened or embeds.shape[1] > 1:  # not a decoding step
            return self._finish(run, output)
        return None

    @untraced
    def _count(self, cache: Any) -> None:
        self.record.cached(*stored_bytes(cache))

    @untraced
    def _finish(self, run: Run, output: Any) -> Any:
        """Put hidden states back to logical length, and note what the pass did."""
        given = Output(output)
        if given.cache is not None:
            self.record.cached(*stored_bytes(given.cache))
        if run.counts and run.images is not None:
            self.record.counted(run.images.tokens, run.counts, run.origins)
        assert given.last is not None
        states = given.states
        if states is not None:
            states = tuple(
                None if each is None else run.restore(each, max(number - 1, 0))
                for number, each in enumerate(states)
            )
        return given.replaced(last=run.restore(given.last, max(run.segments)), states=states)


@dataclass(frozen=True, eq=False)
class _Seen:
    """Findings of a look at a pass.

    Attributes:
        drop: `(batch, slots)` bool, True where a visual token is dropped; None for nowhere.
        images: images of the pass; None where it brings none.
        all_real: whether no slot is padding.
        gaps: whether position ids do not go on by one.
        steps: where they do not, see `steps_of`.
        facts: facts of the layout that is left.
    """

    drop: Tensor | None
    images: Images | None
    all_real: bool
    gaps: bool
    steps: Tensor | None
    facts: Sequence[int] | None = None
