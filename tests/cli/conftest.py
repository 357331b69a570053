from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tokenprune_adapters import pocket


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The shipped model."""
    return pocket.CHECKPOINT


@pytest.fixture
def wide_picture() -> Image.Image:
    """128 x 64 pixels: a pocket scene between two margins, which the image processor cuts off."""
    picture = Image.new("RGB", (128, 64), (10, 200, 30))
    picture.paste(pocket.draw(4).picture, (32, 0))
    return picture


@pytest.fixture
def picture_file(wide_picture: Image.Image, tmp_path: Path) -> Path:
    file = tmp_path / "picture.png"
    wide_picture.save(file)
    return file
