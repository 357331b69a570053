"""The same weights in two libraries give the same signals, by adapters that share no formula."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from support.open_clip_towers import from_transformers, peaked, pictures
from tokenprune import ClsAttention, Keys, observe


@torch.no_grad()
def test_rows_keys_and_features_agree() -> None:
    theirs = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=48,
            patch_size=8,
        )
    )
    theirs = peaked(theirs)
    ours = from_transformers(theirs)
    wanted = [ClsAttention(layers=2), ClsAttention(layers=(-1, 0)), Keys(layer=-2)]
    with observe(theirs, wanted) as one, observe(ours, wanted) as other:
        pooled, output = theirs(pixel_values=pictures()).pooler_output, ours(pictures())
        for signal in wanted:
            torch.testing.assert_close(
                other.signals[signal], one.signals[signal], rtol=1e-5, atol=1e-5
            )
        torch.testing.assert_close(other.tokens.features, one.tokens.features, rtol=1e-5, atol=1e-5)
        assert torch.equal(other.tokens.ids, one.tokens.ids)
    torch.testing.assert_close(output, pooled, rtol=1e-5, atol=1e-5)
