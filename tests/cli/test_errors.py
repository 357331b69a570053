"""What users get wrong is said in one line, with exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenprune.cli import main

GOOD = {"--prompt": "is there a red one ?", "--prune": "random | evict(14)", "--runs": "0"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--prune": "nope | evict(3)"}, "unknown strategy 'nope' in 'nope | evict(3)'; known: "),
        ({"--prune": "evict(3)"}, "Evict ranks tokens by scores, but no scorer stands before it"),
        ({"--prune": "random | evict(0)"}, "keep=0 leaves no visual token before the LLM"),
        ({"--prune": "random | evict(2.5)"}, "a fraction to keep must be in (0, 1], got 2.5"),
        ({"--model": "./nowhere"}, "there is no folder ./nowhere; give a checkpoint's folder"),
        ({"--model": "{empty}"}, "cannot load a model from"),
        ({"--image": "{text}"}, "text.png is not a picture that Pillow can read"),
        ({"--image": "{cut}"}, "cut.png: "),
        ({"--prune": "random | evict(3) @ after-layer(99)"}, "reduced nothing; does this model"),
        ({"--overlay": "o.xyz"}, "cannot write a picture to o.xyz; name it .png"),
        ({"--overlay": "{text}/o.png"}, "cannot write"),
        ({"--dtype": "float31"}, "unknown dtype 'float31'; try float32"),
        ({"--device": "nonsense"}, "cannot use device 'nonsense'"),
    ],
)
def test_one_line(
    change: dict[str, str],
    words: str,
    checkpoint: Path,
    picture_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    empty, text = picture_file.with_name("empty"), picture_file.with_name("text.png")
    empty.mkdir()
    text.write_text("not a picture")
    cut = picture_file.with_name("cut.png")
    cut.write_bytes(picture_file.read_bytes()[:200])
    options = {"--model": str(checkpoint), "--image": str(picture_file), **GOOD}
    options |= {
        name: value.format(empty=empty, text=text, cut=cut) for name, value in change.items()
    }
    with pytest.raises(SystemExit) as stop:
        main(["run", *(word for option in options.items() for word in option)])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("tokenprune: ")
    assert said.count("\n") == 1


def test_a_missing_picture_is_refused_by_the_options(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(
            ["run", "--model", str(checkpoint), "--image", "none.png"]
            + [word for option in GOOD.items() for word in option]
        )
    assert stop.value.code == 2
    assert "none.png" in capsys.readouterr().err


def test_a_command_that_works_exits_with_zero(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["list"])
    assert not stop.value.code
    assert "cls-attention" in capsys.readouterr().out
