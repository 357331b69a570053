"""The contract, and what it does not say: the formula."""

import torch
from tokenprune_sharpness import SharpnessScorer

from tokenprune import Evict, Signals, Strategy, VisualTokens
from tokenprune.testing import parametrize_with_checks


@parametrize_with_checks([SharpnessScorer()])
def test_contract(case, check):
    check(case)


def test_distance_from_the_mean():
    tokens = VisualTokens.of(torch.tensor([[[0.0], [0.0], [9.0]]]))
    assert SharpnessScorer().score(tokens, Signals()).tolist() == [[3.0, 3.0, 6.0]]


def test_what_stands_out_stays():
    tokens = VisualTokens.of(torch.tensor([[[1.0], [1.0], [7.0], [1.0]]]))
    kept = Strategy(SharpnessScorer(), Evict(1))(tokens).tokens.features
    assert kept.flatten().tolist() == [7.0]
