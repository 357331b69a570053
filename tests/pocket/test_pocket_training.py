from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokenprune_adapters.pocket import language, train
from tokenprune_adapters.pocket.loop import Stage

_KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from tokenprune_adapters.pocket import tower, train
torch.set_num_threads(1)
calls, draw = 0, tower.draw
def mortal(*arguments):
    global calls
    calls += 1
    if calls > 10:  # amid the third step of four
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(*arguments)
tower.draw = mortal
train.run(Path(sys.argv[1]), 5, train.QUICK, every=0)
"""


@pytest.mark.usefixtures("one_thread")
def test_killed_run_ends_with_the_weights_of_an_undisturbed_one(
    tmp_path: Path, monkeypatch
) -> None:
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    train.run(calm, 5, train.QUICK)

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run([sys.executable, "-c", _KILLED, disturbed], env=environment, check=False)
    assert child.returncode == -signal.SIGKILL
    assert torch.load(disturbed / "state/tower.pt")["step"] == 2

    with monkeypatch.context() as patch:
        calls = iter(range(5))  # pictures until the next disturbance, in stage 2
        draw = language.draw
        patch.setattr(language, "draw", lambda *some: (next(calls), draw(*some))[1])
        with pytest.raises(StopIteration):
            train.run(disturbed, 5, train.QUICK, every=0)
    assert torch.load(disturbed / "state/language.pt")["step"] == 2
    assert not (disturbed / "checkpoint").exists()

    train.run(disturbed, 5, train.QUICK)
    undisturbed = load_file(calm / "checkpoint/model.safetensors")
    for name, weight in load_file(disturbed / "checkpoint/model.safetensors").items():
        assert torch.equal(weight, undisturbed[name]), name

    results = json.loads((calm / "checkpoint/results.json").read_text())
    assert results["test"]["questions"] == train.QUICK.questions
    assert set(results["scores"]) == {"vanilla", "blind"}
    assert list(results["curve"]) == ["tower", "language"]
    assert "| existence |" in (calm / "checkpoint/README.md").read_text()


def test_rate_warms_up_and_falls_to_zero() -> None:
    stage = Stage("any", steps=1000, batch=1, rate=1.0, warmup=100)
    rates = [stage.rate_at(step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(1, abs=0.03)
    assert rates[-1] < 1e-4


def test_jittered_positions_keep_order_and_number() -> None:
    places = language.stretched(40, torch.Generator().manual_seed(0))
    assert places.shape == (40, 64)
    assert torch.equal(places[:10], torch.arange(64).expand(10, -1))
    gaps = places[10:].diff()
    assert (places[:, 0] == 0).all()
    assert gaps.min() == 0
    assert gaps.max() == 2
