"""Oracle of families, which imports nothing of the adapters: the plain model with explicit masks.

Who drops tokens before the language model hides them from everybody, in every layer; who drops them
after a layer, from that layer on. Positions stay, or are counted anew and given. A merged token
stands at the slot of its anchor. So the plain model, told by hand, computes what a pruned one must.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from support.families import IMAGE, SPECIAL, VIDEO
from tokenprune import Plan, Signals, parse
from tokenprune.tokens import VisualTokens

LOWEST = torch.finfo(torch.float32).min


@dataclass
class Cut:
    """A reduction: a spec of core's strategies, after some layers; 0 is before all."""

    spec: str
    layer: int = 0


def llm_of(model: Any) -> Any:
    core = model.model
    return core.text_model if hasattr(core, "text_model") else core.language_model


def rows_of(model: Any, inputs: dict[str, Any], lengths: list[int]) -> list[Tensor]:
    """`(2, slots)` of each budget row: prompt and column of its placeholders."""
    ids = inputs["input_ids"]
    found: list[Tensor] = []
    slots = {kind: (ids == kind).nonzero().T for kind in (IMAGE, VIDEO)}
    taken = {IMAGE: 0, VIDEO: 0}
    for kind, length in lengths:  # type: ignore[misc]
        first = taken[kind]
        found.append(slots[kind][:, first : first + length])
        taken[kind] = first + length
    return found


@torch.no_grad()
def expected(
    model: Any, inputs: dict[str, Any], lengths: Any, cuts: list[Cut], steps: int, **how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the prompt, where they are of tokens that are left, and the next tokens.

    Args:
        model: unattached.
        inputs: of two prompts, left padded.
        lengths: kind and number of slots of each budget row, in order.
        cuts: what is dropped or merged.
        steps: tokens to generate.
        how: `fixed` where patches of rows are not all their slots; `reindexed`.
    """
    told = _Told(model, inputs, rows_of(model, inputs, lengths), cuts, how)
    logits, tokens, now = None, [], dict(inputs)
    for _ in range(steps):
        with told.steered(now["input_ids"].shape[1]):
            out = model(**now, use_cache=False).logits
        logits = out if logits is None else logits
        newest = out[:, -1].index_fill(1, torch.tensor(SPECIAL), -torch.inf).argmax(-1)
        tokens.append(newest)
        now["input_ids"] = torch.cat([now["input_ids"], newest[:, None]], dim=1)
        ones = torch.ones_like(newest[:, None])
        now["attention_mask"] = torch.cat([now["attention_mask"], ones], dim=1)
        if "mm_token_type_ids" in now:
            types = now["mm_token_type_ids"]
            now["mm_token_type_ids"] = torch.cat([types, types.new_zeros(len(types), 1)], dim=1)
    assert logits is not None
    return logits, told.left(), torch.stack(tokens, dim=1)


class _Told:
    """A model that is told what is dropped where; decided in the first pass, kept in later ones."""

    def __init__(
        self, model: Any, inputs: dict[str, Any], rows: list[Tensor], cuts: list[Cut], how: Any
    ) -> None:
        self.model, self.llm, self.rows, self.how = model, llm_of(model), rows, how
        self.cuts = {cut.layer: cut.spec for cut in cuts}
        self.real = inputs["attention_mask"].bool()
        self.seen = {0: self.real.clone()}
        self.weights: dict[int, list[Tensor]] = {}
        self.anchors: dict[int, list[Tensor]] = {}
        self.attention: dict[int, Tensor] = {}
        self.sizes: list[Tensor | None] = [None] * len(rows)

    def left(self) -> Tensor:
        """`(batch, slots)` bool: tokens that are left in the last layer."""
        return self.seen[max(self.seen)]

    def visible(self, layer: int, width: int) -> Tensor:
        """`(batch, 1, width, width)` additive mask of a layer."""
        seen = self.seen[max(start for start in self.seen if start <= layer)]
        more = torch.ones(len(seen), width - seen.shape[1], dtype=torch.bool)
        columns = torch.cat([seen, more], dim=1)[:, None, None, :]
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        shown = (causal & columns) | torch.eye(width, dtype=torch.bool)
        return torch.zeros(shown.shape).masked_fill(~shown, LOWEST)

    def decide(self, layer: int, hidden: Tensor) -> Tensor:
        """`hidden` with merged tokens at their anchors; notes what is seen from there on."""
        if layer not in self.cuts:
            return hidden
        if layer not in self.weights:
            seen = self.seen[max(self.seen)].clone()
            self.weights[layer], self.anchors[layer] = [], []
            for number, (batch, column) in enumerate(self.rows):
                there = seen[batch, column]
                if "patch" in self.how:
                    there = there & (self.how["patch"][number] >= 0)
                batch, column = batch[there], column[there]
                plan = self.plan(layer, number, hidden[batch, column], batch, column)
                seen[batch, column] = False
                anchors = column[plan.anchors[0]]
                seen[batch[0], anchors] = True
                self.weights[layer].append((batch[0], column, plan))  # type: ignore[arg-type]
                self.anchors[layer].append(anchors)
            self.seen[layer] = seen
        hidden = hidden.clone()
        for (batch, column, plan), anchors in zip(
            self.weights[layer], self.anchors[layer], strict=True
        ):
            if plan.members is not None:
                hidden[batch, anchors] = plan(hidden[batch, column][None])[0]
        return hidden

    def merged(self, stack: Any, visual: Tensor) -> list[Tensor]:
        """What is added between layers, merged as the tokens are."""
        rank = (visual.flatten().cumsum(0) - 1).reshape(visual.shape)
        made = [features.clone() for features in stack]
        for (batch, column, plan), anchors in zip(self.weights[0], self.anchors[0], strict=True):
            if plan.members is not None:
                for new, features in zip(made, stack, strict=True):
                    new[rank[batch, anchors]] = plan(features[rank[batch, column]][None])[0]
        return made

    def plan(self, layer: int, number: int, x: Tensor, batch: Tensor, column: Tensor) -> Any:
        scorer, _, reducer = self.cuts[layer].rpartition(" | ")
        tokens = VisualTokens.of(x[None], sizes=self.sizes[number])
        if scorer == "fastv":
            weights = self.attention[layer - 1][int(batch[0])].mean(0)[-1, column]
            kept = weights.topk(min(int(reducer[6:-1]), len(column))).indices.sort().values
            keep = torch.zeros(1, len(column), dtype=torch.bool)
            return Plan.select(keep.index_fill(1, kept, True))
        reduction = parse(self.cuts[layer]).strategy(tokens, Signals())
        self.sizes[number] = reduction.tokens.sizes
        return reduction.plan

    @contextmanager
    def steered(self, width: int) -> Iterator[None]:
        handles = []

        def before(llm: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            kwargs["inputs_embeds"] = self.decide(0, kwargs["inputs_embeds"])
            if self.how.get("reindexed"):
                more = torch.ones(len(self.real), width - self.real.shape[1], dtype=torch.bool)
                seen = torch.cat([self.seen[0], more], dim=1)
                kwargs["position_ids"] = (seen.cumsum(1) - 1).clamp(min=0)
            kwargs["attention_mask"] = self.visible(0, width)
            if "deepstack_visual_embeds" in kwargs and 0 in self.weights:
                kwargs["deepstack_visual_embeds"] = self.merged(
                    kwargs["deepstack_visual_embeds"], kwargs["visual_pos_masks"]
                )
            return args, kwargs

        def layer_hook(number: int) -> Any:
            def hook(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
                hidden = args[0] if args else kwargs["hidden_states"]
                hidden = self.decide(number, hidden) if number else hidden
                kwargs["attention_mask"] = self.visible(number, width)
                if args:
                    return (hidden, *args[1:]), kwargs
                return args, kwargs | {"hidden_states": hidden}

            return hook

        def keep(number: int) -> Any:
            def hook(module: Any, args: Any, output: Any) -> None:
                self.attention.setdefault(number, output[1])

            return hook

        handles.append(self.llm.register_forward_pre_hook(before, with_kwargs=True))
        for number, layer in enumerate(self.llm.layers):
            handles.append(layer.register_forward_pre_hook(layer_hook(number), with_kwargs=True))
            handles.append(layer.self_attn.register_forward_hook(keep(number)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
