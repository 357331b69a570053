from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tokenprune.plugins import Registry, registry
from tokenprune.trial import Trial


@pytest.fixture
def offering(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Registry]:
    """Let the doctor see the adapter of LLaVA alone, with these trials or its first one."""

    def offer(*trials: Trial) -> Registry:
        known = registry()
        llava = next(each for each in known.models if each.plugin.name == "hf-llava")
        assert llava.plugin.trials is not None
        shown = trials or tuple(llava.plugin.trials())[:1]
        models = [replace(llava, plugin=replace(llava.plugin, trials=lambda: shown))]
        few = replace(known, models=models, broken={})
        monkeypatch.setattr("tokenprune.doctor.examination.registry", lambda: few)
        return few

    return offer
