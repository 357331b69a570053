"""An attached model cannot be exported: that is said, and the plain one still can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tokenprune
from support.llava import collate, prompts, tiny_llava
from support.open_clip_towers import native, pictures
from tokenprune import UnsupportedError
from tokenprune.versions import library

pytestmark = pytest.mark.filterwarnings("ignore")

SPECS = [
    "uniform | evict(4)",
    "cls-attention(layers=1) | evict(4)",
    "fastv | evict(4) @ after-layer(1)",
]


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Any, mask: Any, pixels: Any) -> Any:
        given = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
        return self.model(**given, use_cache=False).logits


def _export(model: Any, given: tuple[Any, ...]) -> Any:
    return torch.export.export(model, given, strict=False).module()


def _trace(model: Any, given: tuple[Any, ...]) -> Any:
    return torch.jit.trace(model, given)


@torch.no_grad()
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("export", [_export, _trace])
def test_an_attached_model_is_refused_in_words(export: Callable[..., Any], spec: str) -> None:
    if torch.__version__.startswith(f"{library('torch').oldest}."):
        pytest.skip("this torch does not say that it exports")
    inputs = collate(prompts()[:1])
    given = (inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"])
    model = Logits(tiny_llava(layers=(2, 2))).eval()
    with (
        tokenprune.attach(model.model, spec),
        pytest.raises(UnsupportedError, match=r"cannot be exported \(torch.export.*detach first"),
    ):
        export(model, given)
    plain = export(model, given)
    torch.testing.assert_close(plain(*given), model(*given), rtol=0, atol=1e-5)


@torch.no_grad()
def test_towers_of_open_clip_are_refused_too() -> None:
    visual = native().eval()
    pixels = pictures(1)
    with (
        tokenprune.attach(visual, "random | evict(0.5) @ after-layer(1)"),
        pytest.raises(UnsupportedError, match="cannot be exported"),
    ):
        torch.jit.trace(visual, pixels)
    torch.jit.trace(visual, pixels)


@torch.no_grad()
def test_a_strict_export_says_so_too() -> None:
    if torch.__version__.startswith(f"{library('torch').oldest}."):
        pytest.skip("this torch does not hand on reasons")
    model = tiny_llava(layers=(2, 2))
    given = collate(prompts()[:1]) | {"use_cache": False}
    with tokenprune.attach(model, SPECS[-1]), pytest.raises(Exception, match="cannot be exported"):
        torch.export.export(model, (), given, strict=True)
