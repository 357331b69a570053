"""`tokenprune picture` on the shipped model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers.image_processing_utils import select_best_resolution
from typer.testing import Result

import tokenprune as library
from support import llava_next
from tokenprune.analysis.canvas import enlarged, picture_of
from tokenprune.analysis.heat import colour_at
from tokenprune.cli import main
from tokenprune.cli.picture import _layers
from tokenprune.cli.seen import Seen
from tokenprune.loading import Loaded
from tokenprune_adapters import pocket

Command = Callable[..., Result]
PANEL = 256 + 14
"""From one panel to the next."""


def panel(drawn: Image.Image, like: Image.Image, column: int) -> Image.Image:
    """The picture of a column of the first row, found by where the first picture stands."""
    first = like.tobytes()
    for top in range(drawn.height - 256):
        box = (14, top, 14 + 256, top + 256)
        if (
            drawn.getpixel((14, top)) == like.getpixel((0, 0))
            and drawn.crop(box).tobytes() == first
        ):
            return drawn.crop((14 + column * PANEL, top, 14 + column * PANEL + 256, top + 256))
    raise AssertionError("the picture is not on the sheet")


def test_methods_side_by_side(tokenprune: Command, tmp_path: Path) -> None:
    out = tmp_path / "new" / "kept.png"
    specs = ("cls-attention | evict(9)", "random | evict(9) @ after-layer(1)")
    output = tokenprune(
        *("picture", "--out", out, "--seed", 5),
        *(word for spec in specs for word in ("--prune", spec)),
    ).output
    assert f"wrote {out}" in output
    drawn = Image.open(out)
    model, processor = pocket.load()
    scene = pocket.draw(5)
    question = pocket.questions(scene)[0]
    plain = enlarged(scene.picture, 4)
    inputs = processor(images=scene.picture, text=pocket.prompt(question), return_tensors="pt")
    for column, spec in enumerate(specs, start=1):
        with library.attach(model, spec) as pruned:
            tokens = model.generate(**inputs, max_new_tokens=1)
        said = processor.decode(tokens[0, -1:], skip_special_tokens=True).strip()
        assert f"{spec} 9 of 64 visual tokens answer: {said} (" in drawn.text["Description"]
        kept = set(pruned.report.kept[0].patch)
        assert len(kept) == 9
        shown = panel(drawn, plain, column)
        for number in range(64):
            box = (number % 8 * 32, number // 8 * 32, number % 8 * 32 + 32, number // 8 * 32 + 32)
            same = shown.crop(box).tobytes() == plain.crop(box).tobytes()
            assert same == (number in kept)


def test_a_schedule_shows_what_is_left_at_its_end(tokenprune: Command, tmp_path: Path) -> None:
    out, spec = tmp_path / "kept.png", "random | evict(20); uniform | evict(5) @ after-layer(1)"
    tokenprune("picture", "--out", out, "--prune", spec)
    drawn = Image.open(out)
    plain = enlarged(pocket.draw(0).picture, 4)
    shown = panel(drawn, plain, 1)
    boxes = [(n % 8 * 32, n // 8 * 32, n % 8 * 32 + 32, n // 8 * 32 + 32) for n in range(64)]
    assert sum(shown.crop(box).tobytes() == plain.crop(box).tobytes() for box in boxes) == 5
    assert "5 of 64 visual tokens" in drawn.text["Description"]


def test_heat_maps(tokenprune: Command, tmp_path: Path, picture_file: Path) -> None:
    out = tmp_path / "heat.png"
    tokenprune(
        *("picture", "--heat", "--out", out, "--image", picture_file),
        *("--prompt", "is there a red one ?", "--prune", "uniform", "--prune", "cls-attention"),
    )
    drawn = Image.open(out).convert("RGB")
    assert "asked: is there a red one ?" in Image.open(out).text["Description"]
    plain = enlarged(pocket.draw(4).picture, 4)
    shown = panel(drawn, plain, 2)
    model, processor = pocket.load()
    text = pocket.prompt("is there a red one ?")
    inputs = processor(images=pocket.draw(4).picture, text=text, return_tensors="pt")
    with library.attach(model, "cls-attention | evict(64)") as pruned:
        model(**inputs)
    scores = pruned.last.scores[0]
    for number in (int(scores.argmax()), int(scores.argmin())):
        colour = shown.getpixel((number % 8 * 32 + 16, number // 8 * 32 + 16))
        wanted = colour_at(float(number == int(scores.argmax())))
        assert all(abs(c - w) <= 64 for c, w in zip(colour, wanted, strict=True))  # under a veil
    layers = _layers(Loaded(model, processor), inputs)
    assert drawn.height > 256 + 300  # a second row, for the layers
    assert list(layers) == list(range(model.config.vision_config.num_hidden_layers - 1))
    maps = attentions(model, inputs["pixel_values"])
    for layer, (row, _) in layers.items():
        torch.testing.assert_close(row, maps[layer][:, :, 0, 1:].mean(1))


def attentions(model: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    tower = model.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        maps = tower(pixel_values=pixels, output_attentions=True).attentions
    tower.set_attn_implementation(before)
    return maps


@pytest.mark.parametrize("per", ["image", "crop"])
def test_crops_of_an_any_resolution_model(per: str) -> None:
    model = llava_next.tiny_llava_next()
    picture = llava_next.Picture.of((40, 90), seed=1)
    inputs = llava_next.collate([llava_next.Prompt([llava_next.BOS, picture, 12, 13])])
    with library.attach(model, f"cls-attention(layers=1) | evict(3, per={per!r})") as pruned:
        model(**inputs)
    height, width = select_best_resolution(picture.size, llava_next.PINPOINTS)
    tiles = height // llava_next.SIDE, width // llava_next.SIDE
    crops = tuple(picture_of(crop, [0.5] * 3, [0.2] * 3) for crop in picture.crops)
    seen = Seen(crops, (4, 4), tiles)
    drawn, plain = seen.reduced(pruned.last, 1), seen.plain(1)
    assert drawn.size == plain.size == (32 + 6 + 32 * tiles[1], 32 * tiles[0])
    heat = seen.heat(pruned.last.scores, pruned.last, 1)
    expected = llava_next.kept(model, picture, 3, per)
    tokens = set(picture.packed)
    for crop in range(len(crops)):
        x0 = 0 if crop == 0 else 38 + (crop - 1) % tiles[1] * 32
        y0 = (32 * tiles[0] - 32) // 2 if crop == 0 else (crop - 1) // tiles[1] * 32
        for patch in range(16):
            box = (x0 + patch % 4 * 8, y0 + patch // 4 * 8)
            box = (*box, box[0] + 8, box[1] + 8)
            colours = drawn.crop(box).getcolors()
            gray = len(colours) == 1 and colours[0][1] == (128, 128, 128)
            assert gray == ((crop, patch) not in tokens)
            same = drawn.crop(box).tobytes() == plain.crop(box).tobytes()
            assert same == ((crop, patch) in expected)
            # Without a score a patch has no hue.
            red, green, blue = heat.getpixel((box[0] + 4, box[1] + 4))
            assert (red == green == blue) == ((crop, patch) not in tokens)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prune", "nope"), "unknown"),
        (("--heat", "--prune", "tome(3)"), "'tome(3)' does not start with a scorer"),
        (("--prune", "fastv | evict(0.5) @ after-layer(99)"), "does this model have such layers?"),
        (("--out", "p.xyz"), "cannot write a picture to p.xyz"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(
    options: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["picture", *options])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_columns_and_merged_tokens(tokenprune: Command, tmp_path: Path) -> None:
    """PruMerge puts one patch into several tokens: more are merged than groups can be drawn."""
    out, spec = tmp_path / "kept.png", "prumerge(keep=9)"
    tokenprune("picture", "--out", out, "--prune", spec, "--columns", 1)
    drawn = Image.open(out)
    assert drawn.width == 256 + 2 * 14
    assert drawn.height > 2 * 256
    scene = pocket.draw(0)
    model, processor = pocket.load()
    text = pocket.prompt(pocket.questions(scene)[0])
    with library.attach(model, spec) as pruned:
        model(**processor(images=scene.picture, text=text, return_tensors="pt"))
    made_of = [int((row > 0).sum()) for row in pruned.last.plan.dense()[0]]
    merged = sum(count > 1 for count in made_of)
    assert f"9 of 64 visual tokens, {merged} of them merged" in drawn.text["Description"]


@pytest.mark.parametrize(("words", "name"), [((), "kept.png"), (("--heat",), "scores.png")])
@pytest.mark.parametrize("made", [True, False])
def test_a_folder_gets_a_picture_of_a_usual_name(
    words: tuple[str, ...], name: str, made: bool, tmp_path: Path, tokenprune: Command
) -> None:
    """As all commands take a folder, there before or not."""
    out = tmp_path / "drawn"
    if made:
        out.mkdir()
    output = tokenprune("picture", "--out", out, *words, "--prune", "random | evict(9)").output
    assert f"wrote {out / name}" in output
    assert Image.open(out / name).size
