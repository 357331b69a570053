"""A hundred damaged files of each format: a picture or a sentence, and nothing else."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from support.damage import broken_chunk, damaged, huge, whole, written
from tokenprune.bench import read
from tokenprune.errors import TokenpruneError
from tokenprune.pictures import PictureError, read_picture


@pytest.mark.parametrize("kind", written())
def test_damage_is_told_in_a_sentence(kind: str, tmp_path: Path) -> None:
    told = 0
    for number, data in enumerate(damaged(kind, 100)):
        file = tmp_path / f"damaged-{number}.{kind.lower()}"
        file.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, of what it passes over
            said = refusal(file)
        if said:
            assert file.name in said
            assert "\n" not in said
            told += 1
    assert told > 10


def refusal(file: Path) -> str:
    """Why a file cannot be read; empty where it can."""
    try:
        assert read_picture(file).mode == "RGB"
    except PictureError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", written())
def test_the_undamaged_is_read(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"whole.{kind.lower()}"
    file.write_bytes(whole(kind))
    assert read_picture(file).size == (24, 20)


@pytest.mark.parametrize("data", [huge(), broken_chunk()], ids=["huge", "broken chunk"])
def test_a_bomb_and_a_broken_chunk_are_named(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "odd.png"
    file.write_bytes(data)
    with pytest.raises(PictureError, match="cannot read the picture .*odd.png: "):
        read_picture(file)


@pytest.mark.parametrize("data", [huge(), broken_chunk(), b"", b"\x89PNG"], ids=str)
def test_prompts_with_pictures_name_them(data: bytes, tmp_path: Path) -> None:
    """The door of `bench` and `tune`."""
    (tmp_path / "odd.png").write_bytes(data)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"image": "odd.png", "question": "what ?", "answer": "a"}\n')
    (sample,) = read(rows)
    with pytest.raises(TokenpruneError, match="odd.png"):
        sample.picture()
