"""What the contract cannot know: the formulas, on tensors that can be checked by hand."""

from __future__ import annotations

import pytest
import torch
from tokenprune_quilt import FoldReducer, OutlierScorer
from tokenprune_quilt.testing import build, collate, prompts

import tokenprune
from tokenprune import Keys, Signals, SpecError, Strategy, VisualTokens

LINE = VisualTokens.of(torch.tensor([[[1.0], [2.0], [3.0], [4.0], [5.0]]]))


def test_outliers_score_high() -> None:
    keys = torch.tensor([[[[0.0], [0.0], [5.0], [0.0], [0.0]]]])
    scores = OutlierScorer().score(LINE, Signals({Keys(-2): keys}))
    assert scores.tolist() == [[1.0, 1.0, 4.0, 1.0, 1.0]]


def test_what_goes_is_folded_into_what_stays() -> None:
    scores = torch.tensor([[0.0, 9.0, 0.0, 8.0, 0.0]])
    reduced = LINE.reduce(FoldReducer(2).plan(LINE, scores, Signals()))
    assert reduced.features.tolist() == [[[2.0], [4.5]]]  # of 1, 2, 3 and of 4, 5
    assert reduced.sizes.tolist() == [[3.0, 2.0]]


def test_the_recipe_is_both() -> None:
    stage = tokenprune.parse("quilt(keep=4)")
    assert stage.strategy == Strategy(OutlierScorer(), FoldReducer(4))
    with pytest.raises(SpecError, match="outlier takes layer: layer must be the index of a block"):
        tokenprune.parse("outlier(layer='last') | fold(4)")


def test_it_works_in_the_model() -> None:
    model, inputs = build(), collate(prompts())
    with tokenprune.attach(model, "quilt(keep=4)") as attachment:
        model.generate(**inputs, max_new_tokens=2, do_sample=False, suppress_tokens=[3])
    assert [(each.before, each.after) for each in attachment.report.images] == [(16, 4)] * 3
    assert attachment.report.kv_bytes_saved > 0
