"""What the config of a language model says, and when it is not the last word."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tokenprune_adapters.hf.anatomy import makes_cache


def language_model(checkpoints: bool = False, training: bool = False, **config: Any) -> Any:
    llm: Any = nn.Linear(1, 1).train(training)
    llm.config, llm.gradient_checkpointing = SimpleNamespace(**config), checkpoints
    return llm


@pytest.mark.parametrize("said", [True, False, None])
def test_the_config_says_whether_a_cache_is_made_unless_the_call_does(said: bool | None) -> None:
    assert makes_cache(language_model(use_cache=True), said) is (said is not False)
    assert makes_cache(language_model(use_cache=False), said) is (said is True)
    assert makes_cache(language_model(), said) is (said is True)


@pytest.mark.parametrize("checkpoints", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_checkpointing_while_training_makes_none(
    checkpoints: bool, training: bool, gradients: bool
) -> None:
    llm = language_model(checkpoints, training, use_cache=True)
    with torch.set_grad_enabled(gradients):
        assert makes_cache(llm, None) is not (checkpoints and training and gradients)
        assert makes_cache(llm, True) is not (checkpoints and training and gradients)


def test_a_model_that_knows_no_checkpointing_makes_one() -> None:
    llm: Any = nn.Linear(1, 1).train()
    llm.config = SimpleNamespace(use_cache=True)
    assert makes_cache(llm, None)
