"""Oracle of families: the plain model, told by hand what is dropped. It knows no adapter.

Who drops tokens before the language model hides them from everybody, in every layer; who drops them
after a layer, from that layer on. Positions stay. A merged token stands at the slot of its anchor.
So the plain model under explicit masks computes what a pruned one must.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenprune.plan import Plan
from tokenprune.signals import Signals
from tokenprune.strategy import Strategy
from tokenprune.tokens import VisualTokens


@dataclass(frozen=True)
class Cut:
    """A reduction.

    Attributes:
        layer: layers that see all tokens; 0 is before the language model.
        strategy: what drops or merges; None: the tokens that the last one of the prompt attends to
            most in the layer before, mean over heads (FastV).
        keep: tokens that FastV keeps.
    """

    layer: int
    strategy: Strategy | None
    keep: int = 0


@dataclass(frozen=True, eq=False)
class Expected:
    """What is expected of a pruned model.

    Attributes:
        logits: `(batch, slots, vocabulary)` of the prompt.
        left: `(batch, slots)` bool, which slots' logits are expected: real ones that are left.
        text: `(batch, steps)` int64, the next tokens.
    """

    logits: Tensor
    left: Tensor
    text: Tensor


@dataclass(eq=False)
class Oracle:
    """A plain model that is told what is dropped where.

    Args:
        model: unattached, with eager attention, which gives its maps.
        llm: its language model.
        rows: `(2, slots)` of each budget row, the prompt and the column of its placeholders.
        patches: the patch that each slot of a row is, -1 for none; None where all are patches.
        cuts: what is dropped or merged.
        silent: token ids that are never said.
        shift: places that what is kept moves within its row, which is wrong.
    """

    model: Any
    llm: Any
    rows: Sequence[Tensor]
    patches: Sequence[Tensor] | None
    cuts: Sequence[Cut]
    silent: Sequence[int] = ()
    shift: int = 0
    _seen: dict[int, Tensor] = field(default_factory=dict)
    _made: dict[int, list[tuple[int, Tensor, Tensor, Plan]]] = field(default_factory=dict)
    _maps: dict[int, Tensor] = field(default_factory=dict)
    _sizes: dict[int, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def expected(self, inputs: Mapping[str, Any], steps: int) -> Expected:
        """Run the prompts, and say `steps` tokens, each from the whole text anew."""
        now: dict[str, Any] = dict(inputs)
        self._seen = {0: now["attention_mask"].bool()}
        first, text = None, []
        for _ in range(steps):
            with self._told(now["input_ids"].shape[1]):
                logits: Tensor = self.model(**now, use_cache=False).logits
            first = logits if first is None else first
            last = logits[:, -1].clone()
            last[:, list(self.silent)] = -torch.inf
            text.append(last.argmax(-1))
            now |= _longer(now, text[-1])
        assert first is not None
        left = self._seen[max(self._seen)]
        return Expected(first, left, torch.stack(text, dim=1))

    @torch.no_grad()
    def logits(self, inputs: Mapping[str, Any], text: Tensor) -> Tensor:
        """`(batch, steps, vocabulary)` logits, by which `(batch, steps)` ids of a text are said."""
        steps, now = text.shape[1], dict(inputs)
        self.expected(now, 1)  # which decides what is dropped
        for token in text[:, :-1].T:
            now |= _longer(now, token)
        with self._told(now["input_ids"].shape[1]):
            logits: Tensor = self.model(**now, use_cache=False).logits[:, -steps:]
        return logits

    def seen_by_the_last(self, layer: int, prompt: int, column: Tensor) -> Tensor:
        """`(slots,)` attention of a prompt's last token to some columns in a layer, head mean."""
        return self._maps[layer][prompt].float().mean(0)[-1, column]

    def _mask(self, layer: int, width: int, like: Tensor) -> Tensor:
        """`(batch, 1, width, width)` of a layer, added to its logits, which are `like` this."""
        seen = self._seen[max(start for start in self._seen if start <= layer)]
        more = seen.new_ones(len(seen), width - seen.shape[1])
        columns = torch.cat([seen, more], dim=1)[:, None, None, :]
        causal = seen.new_ones(width, width).tril()
        # Who sees nothing else sees itself, so that nothing is NaN.
        shown = (causal & columns) | torch.eye(width, dtype=torch.bool, device=seen.device)
        return like.new_zeros(shown.shape).masked_fill(~shown, torch.finfo(like.dtype).min)

    def _cut(self, layer: int, hidden: Tensor) -> Tensor:
        """`hidden` with merged tokens at their anchors; decides in the first pass."""
        cut = next((each for each in self.cuts if each.layer == layer), None)
        if cut is None:
            return hidden
        if layer not in self._made:
            seen = self._seen[max(self._seen)].clone()
            self._made[layer] = []
            for number, (prompts, columns) in enumerate(self.rows):
                there = seen[prompts, columns]
                if self.patches is not None:
                    there = there & (self.patches[number] >= 0).to(there.device)
                prompt, column = int(prompts[0]), columns[there]
                plan = self._plan(cut, number, hidden[prompt, column], prompt, column)
                anchors = column[(plan.anchors[0] + self.shift) % len(column)]
                seen[prompt, column] = False
                seen[prompt, anchors] = True
                self._made[layer].append((prompt, column, anchors, plan))
            self._seen[layer] = seen
        hidden = hidden.clone()
        for prompt, column, anchors, plan in self._made[layer]:
            if plan.members is not None:
                hidden[prompt, anchors] = plan(hidden[prompt, column][None])[0]
        return hidden

    def _plan(self, cut: Cut, number: int, x: Tensor, prompt: int, column: Tensor) -> Plan:
        if cut.strategy is None:
            weights = self.seen_by_the_last(cut.layer - 1, prompt, column)
            kept = weights.topk(min(cut.keep, len(column))).indices
            keep = column.new_zeros(1, len(column)).bool().index_fill(1, kept, True)
            return Plan.select(keep)
        tokens = VisualTokens.of(x[None], sizes=self._sizes.get(number))
        reduction = cut.strategy(tokens, Signals())
        self._sizes[number] = reduction.tokens.sizes
        return reduction.plan

    def _merged(self, stack: Sequence[Tensor], visual: Tensor) -> list[Tensor]:
        """What is added between layers, merged before all of them as the tokens are."""
        rank = (visual.flatten().cumsum(0) - 1).reshape(visual.shape)
        made = [features.clone() for features in stack]
        for prompt, column, anchors, plan in self._made.get(0, []):
            if plan.members is not None:
                for new, features in zip(made, stack, strict=True):
                    new[rank[prompt, anchors]] = plan(features[rank[prompt, column]][None])[0]
        return made

    @contextmanager
    def _told(self, width: int) -> Iterator[None]:
        """Tell the model in a pass over prompts of `width` slots."""

        def before(llm: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            kwargs["inputs_embeds"] = self._cut(0, kwargs["inputs_embeds"])
            kwargs["attention_mask"] = self._mask(0, width, kwargs["inputs_embeds"])
            stack = kwargs.get("deepstack_visual_embeds")
            if stack is not None:
                visual = kwargs["visual_pos_masks"]
                kwargs["deepstack_visual_embeds"] = self._merged(stack, visual)
            return args, kwargs

        handles = [self.llm.register_forward_pre_hook(before, with_kwargs=True)]
        for number, layer in enumerate(self.llm.layers):
            attention = getattr(layer, "self_attn", None)
            if attention is None:
                hook, back = self._skipping(width)
                handles.append(layer.register_forward_hook(back))
            else:
                hook, keep = self._hooks(number, width)
                handles.append(attention.register_forward_hook(keep))
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, number: int, width: int) -> tuple[Any, Any]:
        def before(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            hidden = self._cut(number, hidden) if number else hidden
            kwargs["attention_mask"] = self._mask(number, width, hidden)
            if args:
                return (hidden, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": hidden}

        def after(attention: Any, args: Any, output: Any) -> None:
            self._maps.setdefault(number, output[1])

        return before, after

    def _skipping(self, width: int) -> tuple[Any, Any]:
        """Of a layer with a state, which no mask reaches: what is dropped is padding in front."""
        orders: list[Tensor] = []

        def moved(x: Tensor, by: Tensor) -> Tensor:
            return x.gather(1, by[:, :, None].expand_as(x))

        def before(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            seen = self._seen[0]
            columns = torch.cat([seen, seen.new_ones(len(seen), width - seen.shape[1])], dim=1)
            order = columns.to(torch.uint8).argsort(dim=1, stable=True)
            orders.append(order.argsort(dim=1))
            kwargs["attention_mask"] = columns.gather(1, order)
            return (moved(args[0], order), *args[1:]), kwargs

        def back(layer: Any, args: Any, output: Tensor) -> Tensor:
            return moved(output, orders.pop())

        return before, back


def _longer(inputs: Mapping[str, Any], token: Tensor) -> dict[str, Any]:
    """Arguments that are as long as the text, with one more token of text."""
    ones, zeros = torch.ones_like(token)[:, None], torch.zeros_like(token)[:, None]
    more = {"input_ids": token[:, None], "attention_mask": ones, "mm_token_type_ids": zeros}
    return {
        name: torch.cat([inputs[name], new.to(inputs[name].dtype)], dim=1)
        for name, new in more.items()
        if name in inputs
    }
