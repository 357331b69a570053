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

from tokenprune_adapters import pocket
from train_pocket import language, train
from train_pocket.loop import Stage

_KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from train_pocket import tower, train
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


def test_rate_starts_anew_at_half_the_height_and_is_the_same_before() -> None:
    once = Stage("any", steps=600, batch=1, rate=1.0, warmup=50)
    twice = Stage("any", steps=1000, batch=1, rate=1.0, warmup=50, restart=600)
    rates = [twice.rate_at(step) for step in range(1000)]
    assert rates[:600] == [once.rate_at(step) for step in range(600)]
    assert rates[600] == pytest.approx(0.01)
    assert max(rates[600:]) == pytest.approx(0.5, abs=0.03)
    assert rates[-1] < 1e-4


def test_jittered_positions_keep_order_and_number() -> None:
    shown = torch.arange(64).expand(40, -1)
    places = language.stretched(shown, torch.Generator().manual_seed(0))
    assert places.shape == shown.shape
    assert (places[:, 0] == 0).all()
    assert places.diff().unique().tolist() == [0, 1, 2]


def test_copies_leave_no_patch_out_and_make_the_share_of_objects_vary() -> None:
    scenes = [pocket.draw(seed) for seed in range(200)]
    salient = torch.stack([torch.from_numpy(scene.object_mask).flatten() for scene in scenes])
    random = torch.Generator().manual_seed(0)
    before, after = salient.float().mean(1), []
    for start in range(0, 200, 10):
        shown = language.repeated(scenes[start : start + 10], random)
        assert 64 <= shown.shape[1] <= 128
        assert (shown.diff() >= 0).all()
        assert all(set(row.tolist()) == set(range(64)) for row in shown)
        masks = salient[start : start + 10]
        after += [mask[row].float().mean() for mask, row in zip(masks, shown, strict=True)]
    counts = torch.tensor([len(scene.objects) for scene in scenes]).float()
    told = torch.corrcoef(torch.stack([counts, before, torch.stack(after)]))[0, 1:]
    assert told[1] < 0.6 * told[0]
