"""Data of the pocket task and films of noise, as lmms-eval loads them: from a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.lmms_eval_command import Harness
from tokenprune_adapters import pocket

SCENES = range(4)
FILMS = 3

BROKEN = '''
"""A scorer that works twice and then no more, offered as a package of its own."""
from dataclasses import dataclass
from tokenprune import RandomScorer, Scorer, ScorerPlugin, hookimpl

calls = []

@dataclass(frozen=True)
class Breaks(Scorer):
    def score(self, tokens, signals):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("out of order")
        return RandomScorer().score(tokens, signals)

@hookimpl
def tokenprune_scorers():
    yield ScorerPlugin("breaks", "works twice", Breaks)
'''


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    """Tasks `pocket` and `films`, and a plugin whose scorer fails on the third picture."""
    import numpy as np
    from datasets import Dataset, DatasetDict

    place = tmp_path_factory.mktemp("lmms-eval")
    tasks = shutil.copytree(Path(__file__).with_name("tasks"), place / "tasks")
    for path in tasks.glob("*.yaml"):
        path.write_text(path.read_text().replace("DATA", str(place)))
    asked = [
        (scene.picture, q) for scene in map(pocket.draw, SCENES) for q in pocket.questions(scene)
    ]
    pictures = {
        "picture": [picture for picture, _ in asked],
        "question": [question.text for _, question in asked],
        "answer": [question.answer for _, question in asked],
    }
    DatasetDict({"test": Dataset.from_dict(pictures)}).save_to_disk(place / "pictures")
    noise = np.random.default_rng(0)
    films = [place / f"film-{number}.mp4" for number in range(FILMS)]
    for path in films:
        write_film(path, noise.integers(0, 255, (8, 6, 8, 3), dtype=np.uint8))
    rows = {
        "film": list(map(str, films)),
        "question": ["what colour is it"] * FILMS,
        "answer": ["red"] * FILMS,
    }
    DatasetDict({"test": Dataset.from_dict(rows)}).save_to_disk(place / "films")

    (place / "plugin").mkdir()
    (place / "plugin" / "broken_scorer.py").write_text(BROKEN)
    info = place / "plugin" / "broken_scorer-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-scorer\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[tokenprune]\nbroken = broken_scorer\n")
    return Harness(place, path=(place / "plugin",))


def write_film(path: Path, frames: object) -> None:
    """Eight pixels high and wide for each of the pixels given, so that coding keeps them."""
    import av
    import numpy as np

    large = np.asarray(frames).repeat(8, axis=1).repeat(8, axis=2)
    with av.open(str(path), "w") as film:
        stream = film.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = large.shape[2], large.shape[1], "yuv420p"
        for frame in large:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        film.mux(stream.encode())
