"""Batches of rows get the answers that the model gives to them one at a time."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tokenprune
from support.batch import SPEC, alone, columns
from tokenprune.batch import Answerer, WorkerError
from tokenprune_adapters import pocket


@pytest.fixture(scope="module")
def answerer(rows_file: Path) -> Answerer:
    return Answerer(str(pocket.CHECKPOINT), SPEC, max_new_tokens=1, root=str(rows_file.parent))


def test_the_answers_are_those_of_the_model_alone(
    answerer: Answerer, rows_file: Path, expected: dict[str, str]
) -> None:
    batch = columns(rows_file)
    answers = answerer(batch)
    assert dict(zip(answers["id"], answers["answer"], strict=True)) == expected
    assert len(set(expected.values())) > 3  # otherwise anything would do
    assert answers["image"] == batch["image"]
    assert answers["tokens_before"] == [64] * 12
    assert answers["tokens_after"] == [14] * 12
    assert answers["error"] == [None] * 12


def test_without_a_spec_the_model_is_as_it_was(rows_file: Path) -> None:
    vanilla = Answerer(str(pocket.CHECKPOINT), max_new_tokens=1, root=str(rows_file.parent))
    answers = vanilla(columns(rows_file))
    assert dict(zip(answers["id"], answers["answer"], strict=True)) == alone(rows_file, None)
    assert answers["tokens_before"] == answers["tokens_after"] == [None] * 12


def test_a_bad_row_is_reported_and_the_others_are_answered(
    answerer: Answerer, rows_file: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    whole = (rows_file.parent / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    batch = columns(rows_file)
    batch["image"][1] = str(tmp_path / "none.png")
    batch["image"][3] = str(tmp_path / "cut.png")
    batch["image"][4] = None
    batch["image"][5] = b"no picture"
    batch["prompt"][6] = "USER: <image> and <image> ASSISTANT:"
    batch["prompt"][7] = None
    answers = answerer(batch)
    errors = answers["error"]
    assert [number for number, error in enumerate(errors) if error] == [1, 3, 4, 5, 6, 7]
    for number, words in {
        1: "none.png: [Errno 2] No such file",
        3: "cannot read a picture from",
        4: "the row has no picture",
        5: "cannot read a picture from its bytes",
        6: "a prompt must have one <image> for its picture, got 2",
        7: "the row has no prompt",
    }.items():
        assert words in errors[number]
    for key, answer, error in zip(answers["id"], answers["answer"], errors, strict=True):
        assert answer == (None if error else expected[key])
    assert "image" not in answers  # bytes are not copied into the output


def test_a_batch_of_bad_rows(answerer: Answerer) -> None:
    answers = answerer({"image": ["none.png"], "prompt": ["how many objects are there ?"]})
    assert answers["answer"] == [None]
    assert "none.png" in str(answers["error"][0])


def test_a_picture_that_the_processor_refuses_is_a_bad_row(
    answerer: Answerer,
    rows_file: Path,
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = columns(rows_file)
    answerer(batch)
    processor = type(answerer._worker.model.loaded.processor)
    stock = processor.__call__

    def picky(self, images, **others):
        if any(image.size == (3, 1) for image in images):
            raise TypeError("no such sides")
        return stock(self, images=images, **others)

    monkeypatch.setattr(processor, "__call__", picky)
    batch["image"][2] = np.zeros((1, 3, 3), np.uint8)
    answers = answerer(batch)
    assert answers["error"][2] == "the processor refused the row: no such sides"
    assert dict(zip(answers["id"], answers["answer"], strict=True)) == expected | {"row-2": None}


def test_a_picture_may_be_a_file_bytes_a_mapping_pixels_or_an_image(
    answerer: Answerer, rows_file: Path, expected: dict[str, str]
) -> None:
    image, prompt = "1.png", columns(rows_file)["prompt"][2]
    data = (rows_file.parent / image).read_bytes()
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    forms = [
        image,
        rows_file.parent / image,
        data,
        {"bytes": data, "path": "elsewhere.png"},
        {"bytes": None, "path": image},
        np.asarray(picture),
        picture,
    ]
    answers = answerer({"image": forms, "prompt": [prompt] * len(forms)})
    assert answers["error"] == [None] * len(forms)
    assert answers["answer"] == [expected["row-2"]] * len(forms)
    pixels = answerer({"image": np.stack([np.asarray(picture)] * 2), "prompt": [prompt] * 2})
    assert pixels["answer"] == [expected["row-2"]] * 2
    wrong = answerer({"image": [3.0], "prompt": [prompt]})
    assert re.search("name of a file, bytes or uint8 pixels .*, got float", str(wrong["error"][0]))


def test_the_prompt_of_the_settings_is_for_rows_without_one(
    rows_file: Path, expected: dict[str, str]
) -> None:
    batch = columns(rows_file)
    asks = Answerer(str(pocket.CHECKPOINT), SPEC, batch["prompt"][0], 1, root=str(rows_file.parent))
    answers = asks({"image": batch["image"][:2], "prompt": [None, batch["prompt"][1]]})
    assert answers["answer"] == [expected["row-0"], expected["row-1"]]
    assert asks({"image": batch["image"][:1]})["answer"] == [expected["row-0"]]


def test_it_pickles_as_its_settings_also_after_work(
    answerer: Answerer, rows_file: Path, expected: dict[str, str]
) -> None:
    answerer({"image": ["0.png"], "prompt": ["how many objects are there ?"]})
    sent = pickle.dumps(answerer)
    assert len(sent) < 1000  # no weights in it
    copy = pickle.loads(sent)
    assert copy == answerer
    assert copy.settings == answerer.settings
    first = {name: column[:1] for name, column in columns(rows_file).items()}
    assert copy(first)["answer"] == [expected["row-0"]]


def test_what_is_wrong_with_all_rows_is_raised(rows_file: Path) -> None:
    with pytest.raises(tokenprune.UnknownNameError, match="unknown strategy 'nope'"):
        Answerer("anything", "nope | evict(3)")
    first = {name: column[:1] for name, column in columns(rows_file).items()}
    with pytest.raises(tokenprune.TokenpruneError, match="there is no folder ./nowhere"):
        Answerer("./nowhere")(first)
    checkpoint, root = str(pocket.CHECKPOINT), str(rows_file.parent)
    with pytest.raises(tokenprune.UnsupportedError, match="cannot supply PoolAttention"):
        Answerer(checkpoint, "pool-attention | evict(3)", root=root)(first)
    with pytest.raises(tokenprune.UnsupportedError, match="has the model fewer layers"):
        Answerer(checkpoint, "uniform | evict(3) @ after-layer(99)", root=root)(first)
    with pytest.raises(WorkerError, match="rows need a column 'image', got prompt"):
        Answerer(checkpoint)({"prompt": ["what ?"]})
