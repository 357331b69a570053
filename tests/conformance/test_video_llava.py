"""Video-LLaVA keeps the contract: pictures, videos, and both in one prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from support import video_llava
from support.llava import BOS, generate
from support.video_llava import FRAMES, PATCHES, collate, tiny_video_llava
from tokenprune import AfterLayer, BeforeLLM, Placement
from tokenprune.testing import ModelCase, Prompt, parametrize_with_checks

WRAPS = ("model.get_image_features", "model.get_video_features")


def prompts(mixed: bool = True) -> list[Prompt]:
    """[CLS] of a frame is no visual token: it is never counted, and always kept."""
    picture, videos, _, both = video_llava.prompts()
    text = video_llava.Row([BOS, *range(31, 54)])
    rows = [picture, videos, text, *([both] if mixed else [])]
    return [
        Prompt(
            row,
            len(row.ids),
            tuple(PATCHES if part.ndim == 3 else FRAMES * PATCHES for part in row.visual),
        )
        for row in rows
    ]


def batch(several: Sequence[Prompt]) -> dict[str, Any]:
    return collate([prompt.inputs for prompt in several])


def text(model: nn.Module, inputs: dict[str, Any], steps: int) -> tuple[Tensor, Tensor]:
    answer = generate(model, inputs, steps)
    return answer.text, answer.logits


def by_hand(
    model: Any, prompt: Prompt, kept: list[list[int]], placement: Placement, steps: int
) -> Tensor:
    assert isinstance(placement, BeforeLLM)
    return video_llava.greedy(
        model, prompt.inputs, kept, steps, placement.positions or "reindexed"
    )[1]


def models() -> Iterable[ModelCase]:
    for attention in ("sdpa", "eager"):
        # Of a mixed prompt, the oracle wants what is kept in the prompt's order.
        yield ModelCase(
            f"Video-LLaVA with {attention}, before the LLM",
            partial(tiny_video_llava, attention),
            partial(prompts, mixed=False),
            batch,
            placements=[BeforeLLM(), BeforeLLM("original")],
            generate=text,
            oracle=by_hand,
            wraps=WRAPS,
        )
    yield ModelCase(
        "Video-LLaVA with mixed prompts",
        tiny_video_llava,
        prompts,
        batch,
        placements=[BeforeLLM(), AfterLayer(1), AfterLayer(2, "reindexed")],
        generate=text,
        wraps=WRAPS,
    )


@parametrize_with_checks(list(models()))
def test_contract(case, check):
    check(case)
