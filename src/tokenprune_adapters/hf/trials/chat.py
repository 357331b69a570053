"""Questions for a transformers model: asked as users do, and answered by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.trial import Answer, Cut, Questions

from ...kit.budget_by_hand import clear_budget, kept
from .language import Language
from .prompts import Pictures, Prompt, collated, prompts

STEPS = 4
LAYER = 2


def questions(pictures: Callable[[nn.Module], Pictures]) -> Callable[[nn.Module], Questions]:
    """Makes `Trial.questions` for models that take such pictures."""
    return lambda model: Chat(model, pictures(model)).questions()


class Chat:
    """Two prompts of different length for one model.

    Args:
        model: vanilla, of transformers.
        pictures: what the prompts are about.
    """

    @torch.no_grad()
    def __init__(self, model: Any, pictures: Pictures) -> None:
        self.model = model
        self.pictures = pictures
        self.language = Language(model)
        self.prompts = prompts(model, pictures.parts())

    def questions(self) -> Questions:
        """A cut before the language model, one after a layer of it, and then none."""
        language, layer = self.language, min(LAYER, len(self.language.layers) - 1)
        with torch.no_grad():
            rows = [language.last_query(prompt.embeds, layer - 1) for prompt in self.prompts]
        cuts = (
            self._cut(
                "before the LLM",
                f"{self.pictures.scorer} | evict({{}}) @ before-llm",
                [prompt.scores for prompt in self.prompts],
                lambda prompt, slots, text: language.logits(prompt.embeds[slots], text),
            ),
            self._cut(
                f"after layer {layer}",
                f"fastv | evict({{}}) @ after-layer({layer})",
                rows,
                lambda prompt, slots, text: language.logits(prompt.embeds, text, layer, slots),
            ),
            self._cut(
                "detached",
                "",
                rows,
                lambda prompt, slots, text: language.logits(prompt.embeds, text),
            ),
        )
        return Questions(self.ask, cuts)

    def ask(self) -> Answer:
        """Answers to both prompts, in a batch."""
        pad = self.model.generation_config.pad_token_id or 0
        ids, mask = collated([prompt.ids for prompt in self.prompts], pad)
        given = {"input_ids": ids, "attention_mask": mask, **self.pictures.arguments()}
        return answer(self.model, given)

    def _cut(
        self,
        where: str,
        spec: str,
        scores: Sequence[Tensor],
        run: Callable[[Prompt, Tensor, Tensor], Tensor],
    ) -> Cut:
        """A cut at the clearest budget.

        Args:
            where: words for the place.
            spec: what to attach, with braces for the budget.
            scores: `(slots,)` of each prompt, by which patches are ranked.
            run: `(prompt, slots, text)` to logits, `slots` being what is left of the prompt.
        """
        pairs = list(zip(self.prompts, scores, strict=True))
        ranked = (each[group] for prompt, each in pairs for group in prompt.groups)
        keep = clear_budget(ranked, self.model.dtype)

        def by_hand(text: Tensor, shift: int) -> Tensor:
            made = torch.stack(
                [
                    run(prompt, kept(prompt.groups, each, keep, shift), said)
                    for (prompt, each), said in zip(pairs, text, strict=True)
                ]
            )
            return torch.cat([made[:, :1], made], dim=1)  # prefilled twice, see `answer`

        return Cut(where, spec.format(keep), by_hand)


def answer(model: Any, inputs: Mapping[str, Tensor]) -> Answer:
    """Answers to a batch of prompts: a prefill, then a few tokens with a KV cache."""
    first = model(**inputs).logits[:, -1:]
    made = model.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        num_beams=1,
        eos_token_id=None,
        pad_token_id=model.generation_config.pad_token_id or 0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.cat([first, torch.stack(made.logits, dim=1)], dim=1)
    return Answer(made.sequences[:, inputs["input_ids"].shape[1] :], logits)
