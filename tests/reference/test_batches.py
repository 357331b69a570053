"""A row of four is decided as if it were alone: what reads a neighbour's tokens shows here.

With two rows, an index that counts backwards where it should count forwards still finds its row.
"""

from __future__ import annotations

import pytest
import torch

from tokenprune import Keys, Reducer, Signals, VisualTokens, reducers
from tokenprune.testing.inputs import Inputs

ROWS, TOKENS, CHANNELS = 4, 16, 5
CASES: list[Reducer] = [
    reducers.Evict(5),
    reducers.ToMe(5),
    reducers.ToMe(13),
    reducers.KMeans(5),
    reducers.KMeans(11),
    reducers.Diverse(5),
    reducers.ImportantDiverse(6, step=3),
    reducers.DominantContextual(8, contextual=3),
    reducers.Pool(4),
    reducers.Pool(7),
    # Rows of other lengths keep other numbers, so that what one row has no seat for is there.
    reducers.Evict(0.5),
    reducers.ToMe(0.4),
    reducers.KMeans(0.4),
    reducers.Diverse(0.5),
    reducers.ImportantDiverse(0.5, step=2),
    reducers.DominantContextual(0.5, contextual=0.5),
    reducers.Pool(0.4),
]


def batch(seed: int) -> Inputs:
    """Rows of 16, 12, 16 and 9 tokens; padding on the right."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(ROWS, TOKENS, CHANNELS, generator=generator)
    mask = torch.arange(TOKENS) < torch.tensor([16, 12, 16, 9])[:, None]
    scores = torch.rand(ROWS, TOKENS, generator=generator)
    keys = torch.randn(ROWS, 1, 2, TOKENS, CHANNELS, generator=generator)
    ids = torch.arange(ROWS) + 10 * seed
    tokens = VisualTokens.of(features, mask=mask, ids=ids)
    return Inputs(tokens, Signals({Keys(-2): keys[:, 0]}), scores)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("reducer", CASES, ids=repr)
def test_a_row_among_four_is_decided_as_alone(reducer: Reducer, seed: int) -> None:
    inputs = batch(seed)
    together = reducer.plan(inputs.tokens, inputs.scores, inputs.signals)
    for row in inputs.rows:
        one = inputs.alone(row)
        alone = reducer.plan(one.tokens, one.scores, one.signals)
        kept = alone.lengths[0]
        assert together.lengths[row] == kept
        assert torch.equal(together.anchors[row, :kept], alone.anchors[0])
        real = one.tokens.mask.shape[1]
        torch.testing.assert_close(together.dense()[row, :kept, :real], alone.dense()[0])
