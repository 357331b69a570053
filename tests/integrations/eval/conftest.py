"""Data of the pocket task and films of noise, as lmms-eval loads them: from a folder."""

from __future__ import annotations

import shutil
from dataclasses import replace
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

# https://github.com/EvolvingLMMs-Lab/lmms-eval/pull/1487
MENDED = """
from lmms_eval.models.model_utils.load_video import read_video
from lmms_eval.models.simple import video_llava

def read(path, frames=8, **options):
    return read_video(path, **{"num_frm": frames} | options)

video_llava.read_video = read
"""


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

    return Harness(place, path=(plugin(place, "broken", BROKEN),))


@pytest.fixture(scope="session")
def mended(harness: Harness) -> Harness:
    """With Video-LLaVA as lmms-eval has it after 0.7.3, which cannot read any video."""
    return replace(harness, path=(plugin(harness.place, "mended", MENDED),))


def plugin(place: Path, name: str, code: str) -> Path:
    """The folder of a package that tokenprune loads as a plugin."""
    folder = place / f"plugin-{name}"
    info = folder / f"{name}-0.1.dist-info"
    info.mkdir(parents=True)
    (folder / f"{name}.py").write_text(code)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[tokenprune]\n{name} = {name}\n")
    return folder


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
